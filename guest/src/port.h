/* The machine's end of the line: the virtio-serial port with a given name. */
#ifndef TVINIT_PORT_H
#define TVINIT_PORT_H

/* Wait up to `ms` for the port to appear and open it. -1 and errno. */
int port_open(const char *name, int ms);

#endif
