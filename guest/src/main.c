/* tvinit: one static binary, six modes.
 *
 *   tvinit [guest] [--fd N | --connect PATH]   PID 1 and agent inside a machine (guest.c); the mode when run as PID 1
 *   tvinit launch FD                           execute the launch plan read from FD (launch.c)
 *   tvinit keep FD                             keep one machine as the plan read from FD says (keep.c)
 *   tvinit copy FROM TO                        a folder's files into another one, as they are (copy.c)
 *   tvinit relay WORD...                       a machine's published ports and names, on the host (relay.c)
 *   tvinit fence FD OWN... -- PROGRAM ARG...   what may pass from a machine to user-mode NAT (fence.c)
 */
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "modes.h"

int main(int argc, char **argv) {
    /* Whoever started us may ignore signals, as a shell does for what it runs in the background: a command in a
     * machine would inherit it, and not feel Ctrl-C. A kernel starts PID 1 with none ignored, and behind gVisor each call takes time. */
    for (int s = 1; s < NSIG && getpid() != 1; s++)
        signal(s, SIG_DFL);
    const char *mode = argc > 1 ? argv[1] : "";
    if (!strcmp(mode, "launch"))
        return launch_main(argc - 2, argv + 2);
    if (!strcmp(mode, "keep"))
        return keep_main(argc - 2, argv + 2);
    if (!strcmp(mode, "copy"))
        return copy_main(argc - 2, argv + 2);
    if (!strcmp(mode, "relay"))
        return relay_main(argc - 2, argv + 2);
    if (!strcmp(mode, "fence"))
        return fence_main(argc - 2, argv + 2);
    if (!strcmp(mode, "guest"))
        return guest_main(argc - 2, argv + 2);
    /* A kernel hands options that it does not know to init as arguments: as PID 1 they mean nothing. */
    if (getpid() == 1)
        return guest_main(0, argv);
    fprintf(stderr, "usage: tvinit guest [--fd N | --connect PATH] | launch FD | keep FD | copy FROM TO | relay WORD... | fence FD|uplink:FD OWN GATEWAY... -- PROGRAM ARG...\n");
    return 2;
}
