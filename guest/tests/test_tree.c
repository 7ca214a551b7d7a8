/* Trees: which names are taken. */
#include <string.h>

#include "builtins.h"
#include "check.h"

int main(void) {
    static const char *const good[] = {"", "a", "a/b", ".a", "..a", "a../b", "...", "a b/c\nd", "\xff\xfe"};
    static const char *const bad[] = {"/", "/a", "a/", "a//b", ".", "..", "./a", "a/.", "a/..", "a/../b", "../a"};
    for (size_t i = 0; i < sizeof good / sizeof *good; i++)
        CHECK(tree_name_ok(good[i]));
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        CHECK(!tree_name_ok(bad[i]));
    char *name = malloc(300);
    memset(name, 'a', 299);
    name[256] = 0;
    CHECK(!tree_name_ok(name));
    name[255] = 0;
    CHECK(tree_name_ok(name));
    free(name);
    char *path = malloc(5001);
    for (int i = 0; i < 5000; i++)
        path[i] = i % 2 ? '/' : 'a';
    path[4999] = 0;
    CHECK(!tree_name_ok(path));
    path[4095] = 0;
    CHECK(tree_name_ok(path));
    free(path);
    return 0;
}
