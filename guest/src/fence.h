/* Which frames of a guest may reach user-mode NAT. */
#ifndef TVINIT_FENCE_H
#define TVINIT_FENCE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define FENCE_DENIED 64

struct fence {
    uint32_t own;                  /* the guest's address; all addresses are in network order */
    uint32_t gateway;              /* who connects to published ports; nobody else, so nothing begins with the guest */
    uint32_t denied[FENCE_DENIED]; /* the host's own, beyond those that are denied always */
    int count;
};

/* An Ethernet frame that may go to the host: ARP, or IPv4 from the guest's own address to one that is not denied. */
bool fence_passes(const struct fence *f, const uint8_t *frame, size_t size);

/* Keep of the `*size` bytes at `buffer`, each frame behind its length (u32, big-endian), those that pass. Whole frames become `*out`
 * bytes at the beginning; what is of a frame that has not come whole follows them and makes up the rest of `*size`.
 * false: that is no stream of frames. */
bool fence_sift(const struct fence *f, uint8_t *buffer, size_t *size, size_t *out);

#endif
