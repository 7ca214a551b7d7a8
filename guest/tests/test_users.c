/* Users: names and numbers, groups, and files that an image may have filled with anything. */
#include <errno.h>
#include <string.h>

#include "check.h"
#include "users.h"

static const char passwd[] = "root:x:0:0:root:/root:/bin/bash\n"
                             "broken line\n"
                             "short:x:5\n"
                             "bad:x:12x:1::/:/\n"
                             "huge:x:4294967295:1::/:/\n"
                             "ann:x:1000:1000:Ann,,:/home/ann:/bin/zsh\n"
                             "1001:x:2000:2000::/number:/bin/sh\n"
                             "colons:x:7:7:a:/c:/bin/x:y\n"
                             "last:x:8:8::/last:";
static const char group[] = "root:x:0:\nwheel:x:10:bob,ann\nanns:x:11:annex\nvideo:x:44:ann\nown:x:1000:ann\nnone:x:\n";

static void names(void) {
    struct user u;
    CHECK(user_find("", passwd, group, &u) == 0 && u.uid == 0 && !strcmp(u.home, "/root") && !strcmp(u.shell, "/bin/bash"));
    CHECK(user_find("ann", passwd, group, &u) == 0 && u.uid == 1000 && u.gid == 1000 && !strcmp(u.home, "/home/ann"));
    CHECK(u.group_count == 3 && u.groups[0] == 1000 && u.groups[1] == 10 && u.groups[2] == 44);
    CHECK(user_find("1000", passwd, group, &u) == 0 && !strcmp(u.name, "ann") && u.group_count == 3);
    CHECK(user_find("1001", passwd, group, &u) == 0 && u.uid == 2000); /* a name goes before a number */
    CHECK(user_find("colons", passwd, group, &u) == 0 && !strcmp(u.shell, "/bin/x:y"));
    CHECK(user_find("last", passwd, group, &u) == 0 && !strcmp(u.shell, "/bin/sh"));
    CHECK(user_find("ann:video", passwd, group, &u) == 0 && u.gid == 44 && u.group_count == 1);
    CHECK(user_find("5:6", passwd, group, &u) == 0 && u.uid == 5 && u.gid == 6 && !strcmp(u.home, "/"));
    CHECK(user_find("77", passwd, group, &u) == 0 && u.uid == 77 && u.gid == 0 && !strcmp(u.name, "77"));
    CHECK(user_find("", "", "", &u) == 0 && u.uid == 0 && !strcmp(u.home, "/root") && !strcmp(u.name, "root"));
}

static void refused(void) {
    static const char *const unknown[] = {"nobody", "short", "bad", "huge", "broken line", "4294967295", "99999999999", "-1", "ann:nope", "ann:-1"};
    struct user u;
    for (size_t i = 0; i < sizeof unknown / sizeof *unknown; i++)
        CHECK(user_find(unknown[i], passwd, group, &u) == ENOENT);
    CHECK(user_find(":", passwd, group, &u) == EINVAL);
    CHECK(user_find("ann:", passwd, group, &u) == EINVAL);
    CHECK(user_find(":video", passwd, group, &u) == EINVAL);
}

static void hostile(void) {
    static char text[70000], groups[20000];
    struct user u;
    memset(text, ':', sizeof text - 1);
    CHECK(user_find("ann", text, text, &u) == ENOENT);
    /* A home too long to be true counts as none. */
    strcpy(text, "ann:x:1:1::/");
    memset(text + 12, 'a', 5000);
    strcpy(text + 5012, ":/bin/sh\n");
    CHECK(user_find("ann", text, "", &u) == 0 && !strcmp(u.home, "/"));
    size_t used = 0;
    for (int i = 0; i < 500; i++)
        used += (size_t)snprintf(groups + used, sizeof groups - used, "g%d:x:%d:ann\n", i, i + 2000);
    CHECK(user_find("ann", passwd, groups, &u) == 0 && u.group_count == USER_GROUPS);
}

int main(void) {
    names();
    refused();
    hostile();
    return 0;
}
