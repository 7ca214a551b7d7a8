/* Mounts on which the files of one owner are shown as another's (mount_setattr(2), MOUNT_ATTR_IDMAP). */
#ifndef TVINIT_OWNER_H
#define TVINIT_OWNER_H

/* Show what the root of the detached mount `tree` belongs to as belonging to the ids uid and gid, and the other way round; files of other
 * ids belong to nobody there, and none can be made. Needs root. 0, or -1 with errno. */
int owner_shown_as(int tree, const char *uid, const char *gid);

#endif
