/* Carrying out launch plans (PROTOCOL.md, "Plans"): `tvinit launch`, and the processes of `tvinit keep`.
 *
 * One struct launch lives in the process that becomes the program. Operations run in the plan's order, but
 * what only matters at exec (descriptors, Landlock, seccomp) is collected and applied last, so that
 * the filter needs to allow nothing that we do ourselves but execve and the report of its failure. */
#ifndef TVINIT_LAUNCH_H
#define TVINIT_LAUNCH_H

#include <linux/filter.h>
#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

#include "plan.h"

enum { LAUNCH_FDS = 64, LAUNCH_RULES = 64, LAUNCH_MESSAGE = 512 };

struct launch {
    const struct op *ops;
    size_t count;
    int error_fd;        /* close-on-exec; gets the message if the launch fails */
    int root;            /* O_PATH of the new root until pivot, else -1 */
    int base;            /* the tmpfs that `root` made: the root itself unless an overlay covers it */
    bool over_root;      /* the base is mounted on the old root itself */
    unsigned parts;      /* files and folders in the base that the new root is made from */
    struct prepared *prepared; /* one an operation */
    int oom;             /* /proc/self/oom_score_adj, opened while there still is a /proc, else -1 */
    bool keep_caps;      /* a `caps` operation follows `user` */
    struct { int from, to; } fds[LAUNCH_FDS];
    size_t fd_count;
    struct { const char *path, *flags; } rules[LAUNCH_RULES];
    size_t rule_count;
    bool domain;         /* landlock-domain */
    int apparmor;        /* /proc/self/attr/..., opened while there still is a /proc, else -1 */
    bool guest, hooks;
    struct sock_fprog filter, exec_filter; /* our own; a guest's: of every command */
    int answer;          /* a guest's: where listeners are handed over, -1: nowhere */
    char **env;
};

/* Mounts that the parent made for an operation, since only it may: the child that carries the plan out may be
 * another user, who cannot reach their sources, and in a user namespace, where no ids can be mapped. */
enum { TREES = 3 };

struct prepared {
    int tree[TREES]; /* -1: none */
};

/* The folder that an `overlay` puts above all that it reads, NULL if there is none. */
const char *overlay_above(const struct op *op);

/* Fork (into new namespaces, if the plan asks for them), carry out the plan and wait until the program
 * runs. Returns its pid, or -1 with the reason in message[LAUNCH_MESSAGE]. The process is killed when
 * the caller's thread ends. */
pid_t launch_start(const struct op *ops, size_t count, char *message);

/* Operations. Each returns 0, or -1 with errno. */
int op_uplink(struct launch *l, const struct op *op);
int op_root(struct launch *l, const struct op *op);
int op_dir(struct launch *l, const struct op *op);
int op_file(struct launch *l, const struct op *op);
int op_link(struct launch *l, const struct op *op);
int op_bind(struct launch *l, const struct op *op);
int op_mount(struct launch *l, const struct op *op);
int op_overlay(struct launch *l, const struct op *op);
int op_text(struct launch *l, const struct op *op);
int op_mask(struct launch *l, const struct op *op);
int op_readonly(struct launch *l, const struct op *op);
int op_pivot(struct launch *l, const struct op *op);
int op_rlimit(struct launch *l, const struct op *op);
int op_groups(struct launch *l, const struct op *op);
int op_user(struct launch *l, const struct op *op);
int op_caps(struct launch *l, const struct op *op);
int op_landlock(struct launch *l, const struct op *op);
int op_landlock_domain(struct launch *l, const struct op *op);
int op_seccomp(struct launch *l, const struct op *op);
int op_exec_seccomp(struct launch *l, const struct op *op);

/* The mount that the parent prepared for an operation, else a clone of source that is made here. bind: bind_flags. */
int launch_tree(const struct launch *l, const struct op *op, int which, const char *source, unsigned bind);

/* namespaces.c: what is done around a clone. */
const char *namespaces_check(const struct op *ops, size_t count);
/* Open what the parent must open. False with errno, and nothing left open. */
bool namespaces_prepare(const struct op *ops, size_t count, struct prepared *prepared);
void namespaces_release(struct prepared *prepared, size_t count);
/* fork into the plan's namespaces; *moved: and into its cgroup of version 2. */
pid_t namespaces_clone(const struct op *ops, size_t count, struct prepared *prepared, bool *moved);
/* In the parent: a cgroup, id maps, the prepared mounts' own ids. NULL, or what failed, with errno. */
const char *namespaces_settle(pid_t pid, bool moved, const struct op *ops, size_t count, const struct prepared *prepared);
/* In the child, when the parent has settled it: what is left, and becoming root where the map has one. NULL, or what failed. */
const char *namespaces_enter(const struct op *ops, size_t count);

/* adopt.c: move an interface out of the network namespace `net` into that of a process. False with errno. */
bool adopt_interface(int net, const char *name, pid_t pid);

const struct op *launch_find(const struct op *ops, size_t count, const char *name);

/* Applied at exec, in this order. */
int descriptors_apply(struct launch *l);
int landlock_apply(struct launch *l);
int seccomp_apply(struct launch *l);

#endif
