/* The machine's file systems: the first mounts, modules, the switch to the image's root, and its end. */
#ifndef TVINIT_ROOT_H
#define TVINIT_ROOT_H

/* As PID 1 in an initramfs: /proc, /sys, /dev, and a hold on /modules that outlives the switch of the root. */
int root_begin(void);

/* Load the modules that /modules/order names, one a line; none if there is no such file. */
void modules_begin(void);

/* Load one module of the initramfs. One that is not there, or is loaded, is fine. 0 or errno. */
int module_load(const char *words);

/* squashfs on `lower` (several where there are offsets: pieces.h) under `upper` (an ext4 device, or "ram") becomes the root. 0 or errno, with
 * root_failed. */
int root_switch(const char *lower, const char *upper, char **offsets);

/* Have the file system on `upper` be `size` bytes while it is used, waiting for the device to have them. 0 or errno: ENODEV where the
 * root was not switched to a disk. One that is as large already is left alone, a larger one is EINVAL. */
int root_grow(const char *upper, unsigned long long size);

/* A descriptor of the upper file system's root, or -errno: ENODEV before there is one. */
int root_upper(void);

/* What root_switch was at when it failed. */
extern const char *root_failed;

/* Sync and make every file system as clean as it can be; for the last moment. */
void root_release(void);

/* Replace a file whole, whatever it was (a link too). 0 or errno. */
int replace_file(const char *path, const char *text);

#endif
