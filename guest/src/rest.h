/* File systems at rest for a moment: what lies on the disk then is whole without a look at its journal. */
#ifndef TVINIT_REST_H
#define TVINIT_REST_H

/* Write all out and hold what would write more, for at most so many ms. Returns 0 or errno; ENODEV: none that lasts. */
int rest_begin(int ms);

/* Let them go on. Returns 0, also if none rests; ETIMEDOUT: they went on by themselves before. */
int rest_end(void);

#endif
