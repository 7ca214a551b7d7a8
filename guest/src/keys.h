/* The keys of a terminal that signal: Ctrl-C, Ctrl-\, Ctrl-Z (termios(3), ISIG).
 *
 * gVisor's terminals take them for letters. There, what a client types is looked at here; and since only a process of the
 * terminal's session may learn who is in its foreground, one is left in each, which is told the signals and sends them on. */
#ifndef TVINIT_KEYS_H
#define TVINIT_KEYS_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

/* Whether this kernel's terminals signal by themselves. Found out once, by trying. */
bool keys_signal(void);

/* In a new session's leader, which may share our memory: leave a process in the session that sends on what comes through
 * `told` until that ends. -1 with errno. */
int keys_listen(int terminal, int told);

/* write(2) to a terminal's master, but for keys that signal: the number of such a signal goes to `tell` instead. */
ssize_t keys_write(int master, int tell, const uint8_t *data, size_t size);

#endif
