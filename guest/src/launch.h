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
    int oom;             /* /proc/self/oom_score_adj, opened while there still is a /proc, else -1 */
    bool keep_caps;      /* a `caps` operation follows `user` */
    struct { int from, to; } fds[LAUNCH_FDS];
    size_t fd_count;
    struct { const char *path, *flags; } rules[LAUNCH_RULES];
    size_t rule_count;
    struct sock_fprog filter;
    char **env;
};

/* Fork (into new namespaces, if the plan asks for them), carry out the plan and wait until the program
 * runs. Returns its pid, or -1 with the reason in message[LAUNCH_MESSAGE]. The process is killed when
 * the caller's thread ends. */
pid_t launch_start(const struct op *ops, size_t count, char *message);

/* Operations. Each returns 0, or -1 with errno. */
int op_root(struct launch *l, const struct op *op);
int op_dir(struct launch *l, const struct op *op);
int op_file(struct launch *l, const struct op *op);
int op_link(struct launch *l, const struct op *op);
int op_bind(struct launch *l, const struct op *op);
int op_mount(struct launch *l, const struct op *op);
int op_pivot(struct launch *l, const struct op *op);
int op_rlimit(struct launch *l, const struct op *op);
int op_groups(struct launch *l, const struct op *op);
int op_user(struct launch *l, const struct op *op);
int op_caps(struct launch *l, const struct op *op);
int op_landlock(struct launch *l, const struct op *op);
int op_seccomp(struct launch *l, const struct op *op);

/* Applied at exec, in this order. */
int descriptors_apply(struct launch *l);
int landlock_apply(struct launch *l);
int seccomp_apply(struct launch *l);

#endif
