/*
 * Guest RAM as a vhost-user back-end sees it: follows QEMU's memory map and sends what changed.
 *
 * Copyright (c) 2026 the vhost-user-nvme authors
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef VHOST_USER_MEMORY_H
#define VHOST_USER_MEMORY_H

#include "vhost-user-client.h"

typedef struct VuMemory VuMemory;

/*
 * Sends the whole table and follows the map from then on. Fails if the guest's memory is not shared or the back-end
 * takes not all of it. What goes wrong later is warned about, once for each block of memory; `name` is who warns. Without a
 * client it only looks whether the memory can be shared.
 */
VuMemory *vu_memory_new(VuClient *client, const char *name, Error **errp);
/* The connection is gone: keep following, send nothing. */
void vu_memory_detach(VuMemory *m);
void vu_memory_free(VuMemory *m);

#endif
