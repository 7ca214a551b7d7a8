/* Who a held program is, and becoming that. */
#ifndef TVINIT_BEHALF_IDS_H
#define TVINIT_BEHALF_IDS_H

#include <stdint.h>
#include <sys/types.h>

enum { IDS_GROUPS = 4096 };

#define IDS_CAP_SYS_ADMIN (UINT64_C(1) << 21)

struct ids {
    uid_t uid; /* the one that files are asked for */
    gid_t gid;
    gid_t groups[IDS_GROUPS];
    size_t group_count;
    unsigned umask;
    uint64_t caps;          /* effective */
    long process, thread;   /* as its own pid namespace counts */
};

/* From the folder of /proc, in our user namespace's words: enter its namespace first. -1 and errno; EPERM for more groups than fit. */
int ids_read(int proc, struct ids *out);

/* Its users and groups, its capabilities and `more`, and none else. -1 and errno. */
int ids_become(const struct ids *ids, uint64_t more);

#endif
