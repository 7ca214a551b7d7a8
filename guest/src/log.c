#include "log.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <unistd.h>

#include "line.h"

static int log_fd = STDERR_FILENO;

void log_open(int pid1) {
    int fd = pid1 ? open("/dev/kmsg", O_WRONLY | O_CLOEXEC) : -1;
    if (fd >= 0)
        log_fd = fd;
}

void log_line(const char *format, ...) {
    int saved = errno;
    char text[512];
    va_list args;
    va_start(args, format);
    int size = snprintf(text, sizeof text, "tvinit: ");
    int more = vsnprintf(text + size, sizeof text - (size_t)size - 1, format, args);
    va_end(args);
    if (more > 0)
        size += more;
    if (size > (int)sizeof text - 2)
        size = sizeof text - 2;
    text[size++] = '\n';
    if (!line_log(text, (size_t)size) && write(log_fd, text, (size_t)size) < 0) {
        /* Nothing is left to say it to. */
    }
    errno = saved;
}
