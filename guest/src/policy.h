/* A command with a policy: what its EXEC's operations say (PROTOCOL.md, "Policies"), and its start.
 *
 * It has one seccomp filter of its own, which it installs itself as the last thing before its execve; so from then on it
 * can do nothing that the filter does not allow, execve itself may be held, and nothing that must happen afterwards may be
 * left to it. Two things would have to: the filter's listener is its, and must get out. So before the filter it clones a
 * sibling that shares its descriptors but no filter; it leaves the listener's number in a page that both see, and the
 * sibling sends the listener to the answerer. If that fails the sibling kills it: a program whose listener is lost would
 * go on with calls that fail as if the kernel did not know them.
 *
 * Most filters leave alone what the child itself calls from then on. It then need be no copy of PID 1, nor have a sibling: PID 1
 * lends it its memory until the execve, as to any command, and it sends the listener itself. */
#ifndef TVINIT_POLICY_H
#define TVINIT_POLICY_H

#include <linux/filter.h>
#include <stdbool.h>
#include <sys/types.h>

#include "plan.h"
#include "spawn.h"
#include "wire.h"

struct policy {
    const struct plan *ops;   /* borrowed */
    struct sock_fprog filter; /* of length 0: the machine's own is used, if it has one */
    bool landlock, no_network;
    bool answered;            /* some calls are answered: the filter has a listener */
    bool traced, no_vdso;
    char *const *trace; /* what is traced, of the operation; NULL: no call */
    struct writer handing;    /* what goes to the answerer with the listener */
    const char *failed;       /* what policy_take's errno is about */
};

/* Look the operations through. 0, or errno with `failed` set. Free it in any case. */
int policy_take(const struct plan *ops, struct policy *out);
void policy_free(struct policy *p);

/* As spawn(), and under the policy; by fork(2) where the filter may hold the child. When it returns the child is the user that it shall be and in its folder,
 * and goes on to its filter and its execve. */
pid_t policy_spawn(struct spawn *s, const struct policy *p);

#endif
