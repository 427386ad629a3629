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

/*
 * The words that this device and the daemon share for each vring, behind the doorbell window in its file; the guest never
 * sees them. Without irqfd an interrupt takes the main loop, which first has to wake up: so a virtual CPU that rings
 * watches for a moment whether the interrupt comes at once, and the daemon spares the eventfds meanwhile.
 */
typedef struct QEMU_PACKED NvmeSideWords {
    uint32_t calls;     /* daemon: interrupts signalled */
    uint32_t awake;     /* daemon: whoever serves the submission queue looks by itself, no kick is needed */
    uint32_t reserved0[14];
    uint32_t watching;  /* this device: calls is being looked at, no signal of the eventfd is needed */
    uint32_t attentive; /* this device: it does that */
    uint32_t reserved1[14];
} NvmeSideWords;
QEMU_BUILD_BUG_ON(sizeof(NvmeSideWords) != 128);

/* An interrupt vector and a queue pair's wake-up. */
typedef struct NvmeVring {
    VhostUserNvme *n;
    EventNotifier call;
    EventNotifier kick;
    bool made;
    int virq;       /* KVM's route, or -1 */
    bool irqfd;     /* KVM listens to call, nobody here does */
    uint32_t seen;  /* so many of side->calls were injected */
    unsigned missed, pass_over; /* watches in vain, and rings before the next one */
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
    uint32_t watch_us;
    int32_t bootindex;

    /* the device */
    char *name;             /* for messages */
    MemoryRegion bar;
    MemoryRegion doorbells; /* over the BAR in mapped mode */
    NvmeWindow *window;
    uint32_t side_offset;   /* in the file of the window; 0: the daemon has none */
    NvmeSideWords *side;    /* one for each vring, or NULL */
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
/*
 * A guest's CPU rings the submission queue of the vring: between the two calls the doorbell is stored, and the kick signalled unless the
 * daemon is awake. False: there is nothing to wait for.
 */
bool nvme_watch_begin(NvmeVring *v);
void nvme_watch_end(NvmeVring *v);
/* MSI-X was switched on: KVM injects, if there is one that can. */
void nvme_vectors_to_kvm(VhostUserNvme *n);
/* MSI-X was switched off, or the device is reset or goes: the main loop serves all vectors. */
void nvme_vectors_from_kvm(VhostUserNvme *n);

#endif
