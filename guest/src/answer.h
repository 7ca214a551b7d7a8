/* The answerer: one process a machine that holds its seccomp listeners and answers what their rules say (PROTOCOL.md,
 * "Answers").
 *
 * It is forked lazily: by the keeper of a container, by PID 1 of a virtual machine. It ends with its parent. */
#ifndef TVINIT_ANSWER_H
#define TVINIT_ANSWER_H

enum {
    ANSWER_MESSAGE = 64 * 1024, /* one SEQPACKET message on the intake or a connection, at most */
    ANSWER_TOKEN = 16,
    ANSWER_BUILTIN_FD = 3, /* the builtin `answer` finds PID 1's end of that pair here */
    ANSWER_ATTACH_MS = 5000, /* an attach waits so long for its token to appear, a call so long for its handler's owner */
};

/* Serve until the parent is gone. `intake`: our end of the SOCK_SEQPACKET pair by which PID 1 hands listeners over ('L',
 * with the listener) and, in a virtual machine, builtins their connections ('A'). `listen`: the bound and listening
 * SOCK_SEQPACKET unix socket of a container's folder, or -1. Both are the answerer's from here on. What else the parent had
 * open but 0, 1 and 2 has been closed, signals are as a new program has them. Who changes its user must ask for
 * PR_SET_PDEATHSIG again, and see whether the parent is still there. Returns an exit status. */
int answer_main(int intake, int listen);

#endif
