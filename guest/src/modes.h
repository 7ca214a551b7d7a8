/* Entry points of the modes; each gets the arguments after the mode's name and returns an exit status. */
#ifndef TVINIT_MODES_H
#define TVINIT_MODES_H

int guest_main(int argc, char **argv);
int launch_main(int argc, char **argv);
int keep_main(int argc, char **argv);

#endif
