/*
 * The device vhost-user-nvme: its state, and its parts: the connection, the registers, the doorbell window, the interrupts.
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
#include "qemu/timer.h"
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

/* Where BAR0's registers end, of which the last are the front-end's page, and the doorbells begin. */
#define NVME_REG_CAP 0x000
#define NVME_FRONTEND_PAGE 0xf00
#define NVME_DOORBELLS 0x1000
/* The guest's registers that mean something: what was read of them last answers while nobody is there. */
#define NVME_REGS_KNOWN 0x70
/* Register writes that are kept for a daemon that is not there; no driver comes near it. */
#define NVME_WRITES_KEPT 128

/* Whether somebody is there. */
typedef enum NvmeLink {
    NVME_LINK_AWAY,     /* nobody; the timer (or a fence, before it) brings the next attempt */
    NVME_LINK_ASKED,    /* connected; the first answer is awaited */
    NVME_LINK_RESUMING, /* everything is sent; the daemon says when it serves */
    NVME_LINK_UP,
    NVME_LINK_LOST,     /* for ever */
} NvmeLink;

/* What the daemon says of itself. */
typedef struct NvmeShape {
    uint64_t cap;
    unsigned n_vrings;
    size_t window_size;
    uint32_t side_offset; /* in the file of the window; 0: the daemon has none */
    uint16_t vendor, device, subsystem_vendor, subsystem;
    uint8_t revision;
} NvmeShape;

/* A register write that the daemon has not acknowledged. */
typedef struct NvmeWrite {
    uint32_t addr;
    uint32_t size;
    uint64_t value;
} NvmeWrite;

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
    int fd;             /* the file that is mapped there, or -1 */
    uint64_t fd_offset;
} NvmeWindow;

struct VhostUserNvme {
    PCIDevice parent_obj;

    /* properties */
    char *socket;
    bool wait;
    uint32_t connect_timeout;
    uint32_t reply_timeout;
    uint32_t reconnect_delay;
    uint32_t watch_us;
    int32_t bootindex;
    uint16_t queues;            /* these three: of a daemon that is not waited for */
    uint32_t queue_entries;
    uint8_t doorbell_stride;

    /* the device */
    char *name;             /* for messages */
    MemoryRegion bar;
    MemoryRegion doorbells; /* over the BAR in mapped mode */
    NvmeWindow *window;
    NvmeSideWords *side;    /* one for each vring, or NULL */
    NvmeShape shape;
    unsigned n_vrings;      /* of which there is something to clean up */
    unsigned stride_shift;  /* doorbell offset >> this is the vring */
    NvmeVring vrings[MAX_VRINGS];
    bool vector_notifiers;
    QemuUUID instance_id;
    bool msix_made;
    Error *migration_blocker;

    /* the registers */
    uint8_t known[NVME_REGS_KNOWN];
    NvmeWrite kept[NVME_WRITES_KEPT];
    unsigned n_kept;
    bool kept_too_many;     /* and it was told */
    bool used;              /* the guest has written to a register since the last reset, and the daemon may have done it */

    /* the connection */
    NvmeLink link;
    VuClient *client;
    VuMemory *memory;
    bool met;               /* it has been up before */
    bool window_mapped;
    NvmeFence *fence;       /* whose end an answer, or the next attempt, waits for */
    QEMUBH *gone_bh;
    QEMUTimer *timer;       /* the next attempt, or the end of patience with this one */
    int64_t lost_at;
    int64_t blocked;        /* ms for which the last attempt made the machine wait */
    bool told;              /* what is wrong with the attempts */
};

/* ------------------------------------------------------------------ the connection (vhost-user-nvme-link.c) */

/* Connects, waiting as long as the properties say; n->shape is the daemon's. */
bool nvme_link_open(VhostUserNvme *n, Error **errp);
/* The rest, when the device has what it needs; the link is up. */
bool nvme_link_finish(VhostUserNvme *n, Error **errp);
/* Without waiting: n->shape is what the properties say. */
bool nvme_link_assume(VhostUserNvme *n, Error **errp);
/* The rest of that: the first attempt comes from the main loop. */
bool nvme_link_later(VhostUserNvme *n, Error **errp);
/* Waits for a daemon that is just resuming: up, or away. For those who need to know that nothing moves any more. */
void nvme_link_settle(VhostUserNvme *n);
/* RESET_DEVICE, and what the protocol lets it forget. Only while the link is up. */
bool nvme_link_reset(VhostUserNvme *n);
/* The device goes. */
void nvme_link_close(VhostUserNvme *n);

/* ------------------------------------------------------------------ the registers (vhost-user-nvme-regs.c) */

uint64_t nvme_regs_read(VhostUserNvme *n, uint32_t addr, unsigned size);
void nvme_regs_write(VhostUserNvme *n, uint32_t addr, uint64_t value, unsigned size);
/* What CAP and VS are; all else reads as after a reset. */
void nvme_regs_init(VhostUserNvme *n, uint64_t cap);
/* The device was reset: nothing is kept, and nothing was written. */
void nvme_regs_reset(VhostUserNvme *n);
/* Asks the daemon for what the registers are, and sends the kept writes. */
VuResult nvme_regs_resume(VhostUserNvme *n);

/* ------------------------------------------------------------------ the doorbell window (vhost-user-nvme-window.c) */

/* Reserves addresses for n->window->size bytes, where nobody's memory is yet. */
bool nvme_window_reserve(VhostUserNvme *n);
/* The window itself, mapped or not, is kept until nobody can use it. */
void nvme_window_free(NvmeWindow *w);
VuAnswer nvme_window_map(void *opaque, const VuMapping *m, int fd);
VuAnswer nvme_window_unmap(void *opaque, const VuMapping *m);
/* Shows it to the guest as memory, or no more. */
void nvme_window_show(VhostUserNvme *n, bool on);
/*
 * The connection is gone. The guest does not reach the window as memory any more; it stays mapped here. True: this is
 * so now. False: nvme_link_trapped is called when it is.
 */
bool nvme_window_take_back(VhostUserNvme *n);
void nvme_link_trapped(VhostUserNvme *n);
/* Nobody will come back: the file is let go of. */
void nvme_window_abandon(VhostUserNvme *n);
void nvme_side_unmap(VhostUserNvme *n);

/* ------------------------------------------------------------------ interrupts (vhost-user-nvme-irq.c) */

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
