/* CHECK: a failed one says where and ends the test.. */
#ifndef TVINIT_CHECK_H
#define TVINIT_CHECK_H

#include <stdio.h>
#include <stdlib.h>

#define CHECK(what)                                                                \
    do {                                                                           \
        if (!(what)) {                                                             \
            fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #what);     \
            exit(1);                                                               \
        }                                                                          \
    } while (0)

#endif
