/* Roots of more than one layer, and what is put over parts of them.
 *
 * An overlay's layers are attached in the tmpfs that `root` made, which the overlay then covers: names in them
 * never meet those of the machine, and no path of the host is looked up by the child. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "launch.h"
#include "mounts.h"

enum { NAME = 32 };

static const uint64_t PLAIN = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC;

static int keep_errno(int fd, int result) {
    int saved = errno;
    close(fd);
    errno = saved;
    return result;
}

int disk_tree(const char *layer) {
    char device[NAME];
    const char *end = strchr(layer + strlen(LAYER_DISK), ':');
    int size = end ? (int)(end - layer - strlen(LAYER_DISK)) : NAME;
    if (size >= NAME) {
        errno = EINVAL;
        return -1;
    }
    snprintf(device, sizeof device, "%.*s", size, layer + strlen(LAYER_DISK));
    /* A fresh file reads as zeros, so inode tables need no initialising; what is deleted is given back to the host. */
    return new_filesystem("ext4", device, "noinit_itable,discard,errors=remount-ro");
}

/* Where in a layer's tree its `upper` and `work` are, with a slash before it. */
static const char *layer_folder(const char *layer) {
    const char *colon = strncmp(layer, LAYER_DISK, strlen(LAYER_DISK)) ? NULL : strchr(layer + strlen(LAYER_DISK), ':');
    return colon ? colon + 1 : "";
}

/* The writable layer: a folder with `upper` and `work`, one on a disk that the parent mounted, or a new tmpfs. */
static int layer_tree(const struct launch *l, const struct op *op) {
    char data[64];
    if (strncmp(op->words[2], LAYER_RAM, strlen(LAYER_RAM)))
        return launch_tree(l, op, 1, op->words[2], BIND_ALONE);
    snprintf(data, sizeof data, "mode=0755,size=%.40s", op->words[2] + strlen(LAYER_RAM));
    int tree = new_filesystem("tmpfs", "layer", data);
    if (tree >= 0 && (mkdirat(tree, "upper", 0755) < 0 || mkdirat(tree, "work", 0700) < 0))
        return keep_errno(tree, -1);
    return tree;
}

static int set(int fs, const char *key, const char *value) { return fsconfig(fs, FSCONFIG_SET_STRING, key, value, 0); }

/* Words of FLAGS but `idmap`, which was for whoever prepared the layers, are options of overlayfs. */
static int set_flags(int fs, const char *words) {
    for (const char *at = words; *at;) {
        char word[NAME];
        size_t n = strcspn(at, ",");
        snprintf(word, sizeof word, "%.*s", n < sizeof word ? (int)n : 0, at);
        char *value = strchr(word, '=');
        if (value)
            *value++ = 0;
        if (*word && strcmp(word, "idmap") && (value ? set(fs, word, value) : fsconfig(fs, FSCONFIG_SET_FLAG, word, NULL, 0)) < 0)
            return -1;
        at += n + (at[n] == ',');
    }
    return 0;
}

/* Names are relative to the base, which is the working folder: the kernel looks them up as the child may. */
static int overlay_tree(const char *lower, const char *layer, const char *flags) {
    char upper[PATH_MAX], work[PATH_MAX];
    if (snprintf(upper, sizeof upper, "%s/upper", layer) >= (int)sizeof upper || snprintf(work, sizeof work, "%s/work", layer) >= (int)sizeof work) {
        errno = ENAMETOOLONG;
        return -1;
    }
    int fs = fsopen("overlay", FSOPEN_CLOEXEC);
    if (fs < 0)
        return -1;
    int tree = -1;
    if (set(fs, "source", "overlay") == 0 && set(fs, "lowerdir", lower) == 0 && set(fs, "upperdir", upper) == 0 &&
        set(fs, "workdir", work) == 0 && set_flags(fs, flags) == 0 && fsconfig(fs, FSCONFIG_CMD_CREATE, NULL, NULL, 0) == 0)
        tree = fsmount(fs, FSMOUNT_CLOEXEC, 0);
    return keep_errno(fs, tree);
}

enum { LOWERS = 127, OVERLAY_WORDS = 5, FIRST_NAME = '0' }; /* overlay and its four fixed words */

/* The names of lower folders that are several: a link of one byte each, since a mount option of fsconfig(2) is at most 255 bytes long,
 * and overlayfs takes folders one by one (lowerdir+) only since Linux 6.5. None is a byte that it or a path takes for its own. */
static int short_name(int name) {
    while (strchr("/:,.\\", ++name) || name == 0x7f)
        ;
    return name;
}

const char *overlay_above(const struct op *op) {
    return op->count > OVERLAY_WORDS && *op->words[OVERLAY_WORDS] == '/' ? op->words[OVERLAY_WORDS] : NULL;
}

/* Link to the folders that the operation names in the lower tree, and the one above it, in a new folder of the base, which becomes the
 * working folder. */
static int stack_lowers(struct launch *l, const struct op *op, const char *lower, const char *above, char *names, size_t size) {
    char place[NAME], name[2] = {0, 0}, target[PATH_MAX];
    size_t used = 0;
    snprintf(place, sizeof place, ".stack.%u", l->parts);
    if (op->count - OVERLAY_WORDS > LOWERS || 2 * (op->count - OVERLAY_WORDS) > size) {
        errno = E2BIG;
        return -1;
    }
    if (mkdirat(l->base, place, 0700) < 0)
        return -1;
    int folder = openat(l->base, place, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (folder < 0)
        return -1;
    int byte = FIRST_NAME - 1;
    for (size_t i = OVERLAY_WORDS; i < op->count; i++) {
        byte = short_name(byte);
        name[0] = (char)byte;
        bool own = i == OVERLAY_WORDS && overlay_above(op);
        if (snprintf(target, sizeof target, "../%s/%s", own ? above : lower, own ? "." : op->words[i]) >= (int)sizeof target) {
            errno = ENAMETOOLONG;
            return keep_errno(folder, -1);
        }
        if (symlinkat(target, folder, name) < 0)
            return keep_errno(folder, -1);
        names[used++] = name[0];
        names[used++] = ':';
    }
    names[used - 1] = 0;
    return keep_errno(folder, fchdir(folder));
}

int op_overlay(struct launch *l, const struct op *op) {
    char lower[NAME], above[NAME], layer[NAME], at[NAME + 1], inside[PATH_MAX], names[2 * LOWERS];
    bool several = op->count > OVERLAY_WORDS;
    bool whole = !strcmp(op->words[4], "/");
    unsigned part = l->parts++;
    snprintf(lower, sizeof lower, ".lower.%u", part);
    snprintf(above, sizeof above, ".above.%u", part);
    snprintf(layer, sizeof layer, ".layer.%u", part);
    int tree = launch_tree(l, op, 0, op->words[1], BIND_ALONE);
    snprintf(at, sizeof at, "/%s", lower);
    if (tree < 0 || attach(l->base, tree, MOUNT_ATTR_RDONLY | PLAIN, at, true) < 0)
        return -1;
    if (overlay_above(op)) {
        tree = launch_tree(l, op, 2, overlay_above(op), BIND_ALONE);
        snprintf(at, sizeof at, "/%s", above);
        if (tree < 0 || attach(l->base, tree, MOUNT_ATTR_RDONLY | PLAIN, at, true) < 0)
            return -1;
    }
    tree = layer_tree(l, op);
    snprintf(at, sizeof at, "/%s", layer);
    if (tree < 0 || attach(l->base, tree, PLAIN, at, true) < 0 || fchdir(l->base) < 0)
        return -1;
    if (several && stack_lowers(l, op, lower, above, names, sizeof names) < 0)
        return -1;
    snprintf(inside, sizeof inside, "%s%s%s", several ? "../" : "", layer, layer_folder(op->words[2]));
    tree = overlay_tree(several ? names : lower, inside, op->words[3]);
    int root = tree >= 0 && whole ? fcntl(tree, F_DUPFD_CLOEXEC, 3) : -1;
    if (tree < 0 || (whole && root < 0) || attach(l->root, tree, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV, op->words[4], true) < 0)
        return -1;
    if (whole) {
        if (l->root != l->base)
            close(l->root);
        l->root = root;
    }
    return 0;
}

/* A file of ours over one of the root, or of a root within it, whose links then stay within that: the layers stay as they were, and no
 * link in them is written through. */
int op_text(struct launch *l, const struct op *op) {
    char name[NAME];
    mode_t mode;
    size_t size = strlen(op->words[3]);
    int within = op->count > 4 ? open_in(l->root, op->words[4], O_PATH | O_DIRECTORY) : -1;
    if (op->count > 4 && within < 0)
        return -1;
    if (!parse_mode(op->words[2], &mode))
        return -1;
    snprintf(name, sizeof name, ".text.%u", l->parts++);
    int file = openat(l->base, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (file < 0)
        return -1;
    bool written = write(file, op->words[3], size) == (ssize_t)size && fchmod(file, mode) == 0;
    if (keep_errno(file, written ? 0 : -1) < 0)
        return -1;
    int tree = open_tree(l->base, name, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
    int done = tree < 0 ? -1 : attach(within < 0 ? l->root : within, tree, PLAIN, op->words[1], false);
    return within < 0 ? done : keep_errno(within, done);
}

/* Call cover for each of the paths that exists. */
static int each(struct launch *l, const struct op *op, int (*cover)(struct launch *l, int at, bool folder)) {
    for (size_t i = 1; i < op->count; i++) {
        struct stat st;
        int at = open_in(l->root, op->words[i], O_PATH);
        if (at < 0 && (errno == ENOENT || errno == ENOTDIR))
            continue;
        if (at < 0 || fstat(at, &st) < 0 || keep_errno(at, cover(l, at, S_ISDIR(st.st_mode))) < 0)
            return -1;
    }
    return 0;
}

/* Lay a detached mount over what is open; closes tree. */
static int lay(int tree, int at, uint64_t attributes) {
    struct mount_attr attr = {.attr_set = attributes};
    int r = tree < 0 ? -1 : mount_setattr(tree, "", AT_EMPTY_PATH | AT_RECURSIVE, &attr, sizeof attr);
    if (r == 0)
        r = move_mount(tree, "", at, "", MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH);
    return tree < 0 ? -1 : keep_errno(tree, r);
}

/* An empty folder, or a device that is always at its end. */
static int cover_with_nothing(struct launch *l, int at, bool folder) {
    const char *nothing = folder ? ".nothing" : "dev/null";
    if (folder && mkdirat(l->base, nothing, 0555) < 0 && errno != EEXIST)
        return -1;
    int tree = open_tree(folder ? l->base : l->root, nothing, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
    return lay(tree, at, folder ? MOUNT_ATTR_RDONLY | PLAIN : MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC);
}

static int cover_read_only(struct launch *l, int at, bool folder) {
    (void)l, (void)folder;
    int tree = open_tree(at, "", OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_EMPTY_PATH | AT_RECURSIVE);
    return lay(tree, at, MOUNT_ATTR_RDONLY | PLAIN);
}

int op_mask(struct launch *l, const struct op *op) { return each(l, op, cover_with_nothing); }

int op_readonly(struct launch *l, const struct op *op) { return each(l, op, cover_read_only); }
