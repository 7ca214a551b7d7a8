/* What a held program is read of: memory and paths, each copied once. All bounded; the program may change it meanwhile, or be gone. */
#ifndef TVINIT_TARGET_H
#define TVINIT_TARGET_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "rules.h"

/* Read up to `size` bytes at `address`: how many there are, -1 and errno if none. */
ssize_t target_read(pid_t pid, uint64_t address, void *out, size_t size);

/* A string of less than `size` bytes: its length, -1 and errno (ENAMETOOLONG: no NUL within `size`). */
ssize_t target_string(pid_t pid, uint64_t address, char *out, size_t size);

/* The process that a thread is of, as a pidfd; -1. */
int target_pidfd(pid_t pid);

/* Its memory, to write; -1 and errno. */
int target_memory(pid_t pid);

/* All of it, or -1 and errno. */
int target_write(int memory, uint64_t address, const void *data, size_t size);

/* What a rule's path is of a call of `pid`, as rules_decide asks. */
struct target {
    pid_t pid;
    const struct rule *known; /* the rule whose path `path` is */
    char base[RULES_PATH], text[RULES_PATH], path[RULES_PATH];
};

const char *target_path(void *target, const struct seccomp_data *call, const struct rule *rule);

#endif
