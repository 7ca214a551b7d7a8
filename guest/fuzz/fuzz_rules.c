/* What PID 1 of a hostile machine may hand over as rules, and calls that are put to them; requests of things on behalf, paths. */
#include <stdlib.h>
#include <string.h>

#include "behalf.h"
#include "behalf_make.h"
#include "rules.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static char text[RULES_PATH];

static const char *path(void *context, const struct seccomp_data *call, const struct rule *rule) {
    const char *base = context;
    static char out[RULES_PATH];
    (void)call;
    if (rule->path_arg < 0 || rule->path_arg > 5 || !rules_absolute(base, text, out))
        return NULL;
    if (out[0] != '/' || strstr(out, "//") || strstr(out, "/../") || strlen(out) >= RULES_PATH)
        abort();
    return out;
}

static void put(struct rules *r, const uint8_t *data, size_t size) {
    struct seccomp_data call = {0};
    memcpy(&call, data, size < sizeof call ? size : sizeof call);
    if (r->count && r->list[0].call_count)
        call.nr = r->list[0].calls[0];
    for (int i = 0; i < 4; i++) {
        struct verdict v = rules_decide(r, &call, (struct path_source){path, (void *)(uintptr_t)(i % 2 ? "/base" : "x/../y")});
        if (v.delay < 0 || v.delay > RULES_DELAY || (v.act == ACT_ERRNO && (v.value < 1 || v.value > 4095)))
            abort();
    }
    rules_handled(r, call.nr);
}

static void on_behalf(const uint8_t *data, size_t size) {
    static const char kinds[] = "PMN";
    for (int i = 0; i < 3; i++) {
        struct reader r = reader_of(data, size);
        struct behalf b;
        if (!behalf_read(&r, kinds[i], &b))
            continue;
        char out[MAKE_WORDS];
        int own;
        make_words(b.path, 1234567890123, 1234567890123, out, &own);
        if (strlen(out) >= MAKE_WORDS - 1)
            abort();
        behalf_free(&b);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct rules r;
    size_t n = size < sizeof text - 1 ? size : sizeof text - 1;
    memcpy(text, data, n);
    text[n] = 0;
    if (rules_decode(data, size, &r)) {
        put(&r, data, size);
        rules_free(&r);
    }
    char glob[64];
    memcpy(glob, data, n = n < sizeof glob - 1 ? n : sizeof glob - 1);
    glob[n] = 0;
    rules_glob(glob, text);
    on_behalf(data, size);
    return 0;
}
