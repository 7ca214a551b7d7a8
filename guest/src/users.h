/* Who a command runs as, from the machine's own /etc/passwd and /etc/group.
 *
 * A parser of our own: the C library's would pull name services into a static program, and these files
 * belong to the image, so every length is bounded. */
#ifndef TVINIT_USERS_H
#define TVINIT_USERS_H

#include <stddef.h>
#include <sys/types.h>

enum { USER_GROUPS = 64, USER_TEXT = 256 };

struct user {
    uid_t uid;
    gid_t gid;
    gid_t groups[USER_GROUPS];
    size_t group_count;
    char name[USER_TEXT], home[USER_TEXT], shell[USER_TEXT];
};

/* `spec` as in EXEC: "" is root; name, uid, name:group, uid:gid. A uid or gid need not be in the files. With a group
 * there are no supplementary ones. 0, or ENOENT (no such name), EINVAL (not a spec). */
int user_find(const char *spec, const char *passwd, const char *group, struct user *out);

/* The same with the texts of /etc/passwd and /etc/group. */
int user_lookup(const char *spec, struct user *out);

/* Text of a regular file of at most `max` bytes, NUL-terminated; NULL and errno. Free it. */
char *read_text(const char *path, size_t max);

#endif
