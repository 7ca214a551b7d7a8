/* PID 1's own log: to the kernel's ring (or stderr) until a keeper listens, then as LOG frames. */
#ifndef TVINIT_LOG_H
#define TVINIT_LOG_H

/* Where lines go while no keeper listens: /dev/kmsg as PID 1, else stderr. */
void log_open(int pid1);

/* One line, cut at 512 bytes. Keeps errno. */
void log_line(const char *format, ...) __attribute__((format(printf, 1, 2)));

#endif
