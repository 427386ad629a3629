/*
 * The device vhost-user-nvme: its state, and its interrupts as a part of their own.
 *
 * Copyright (c) 2026 the vhost-user-nvme authors
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef VHOST_USER_NVME_H
#define VHOST_USER_NVME_H

#include "compat.h"
#include "hw/pci/pci_device.h"
#include "qemu/event_notifier.h"
#include "qemu/rcu.h"
#include "qemu/uuid.h"
#include "vhost-user-client.h"
#include "vhost-user-memory.h"

#define TYPE_VHOST_USER_NVME "vhost-user-nvme"
OBJECT_DECLARE_SIMPLE_TYPE(VhostUserNvme, VHOST_USER_NVME)

#define MAX_VRINGS 64

/* An interrupt vector and a queue pair's wake-up. */
typedef struct NvmeVring {
    VhostUserNvme *n;
    EventNotifier call;
    EventNotifier kick;
    bool made;
    int virq;       /* KVM's route, or -1 */
    bool irqfd;     /* KVM listens to call, nobody here does */
} NvmeVring;

/* Waits until every virtual CPU has seen the memory map that no longer shows the window. */
typedef struct NvmeFence {
    VhostUserNvme *n; /* referenced */
    unsigned left;
} NvmeFence;

/* The address range of the window, which outlives the device by a grace period. */
typedef struct NvmeWindow {
    struct rcu_head rcu;
    void *start;
    size_t size;
} NvmeWindow;

struct VhostUserNvme {
    PCIDevice parent_obj;

    /* properties */
    char *socket;
    uint32_t connect_timeout;
    uint32_t reply_timeout;
    int32_t bootindex;

    /* the device */
    char *name;             /* for messages */
    MemoryRegion bar;
    MemoryRegion doorbells; /* over the BAR in mapped mode */
    NvmeWindow *window;
    unsigned n_vrings;
    unsigned stride_shift;  /* doorbell offset >> this is the vring */
    NvmeVring vrings[MAX_VRINGS];
    bool vector_notifiers;
    QemuUUID instance_id;
    bool msix_made;
    Error *migration_blocker;

    /* the connection */
    VuClient *client;
    VuMemory *memory;
    bool window_mapped;
    NvmeFence *fence;       /* whose end is an answer that the back-end waits for */
    QEMUBH *gone_bh;
};

/* Makes the eventfds of n->n_vrings vrings; signals are served by the main loop. */
bool nvme_vrings_init(VhostUserNvme *n, Error **errp);
void nvme_vrings_cleanup(VhostUserNvme *n);
/* MSI-X was switched on: KVM injects, if there is one that can. */
void nvme_vectors_to_kvm(VhostUserNvme *n);
/* MSI-X was switched off, or the device is reset or goes: the main loop serves all vectors. */
void nvme_vectors_from_kvm(VhostUserNvme *n);

#endif
