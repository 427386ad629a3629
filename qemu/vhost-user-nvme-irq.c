/*
 * Interrupts of the device vhost-user-nvme: from an eventfd to an MSI-X message, through KVM where it can.
 *
 * Copyright (c) 2026 the vhost-user-nvme authors
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "qemu/osdep.h"

#include "hw/pci/msi.h"
#include "hw/pci/msix.h"
#include "qapi/error.h"
#include "qemu/error-report.h"
#include "qemu/main-loop.h"
#include "qemu/processor.h"
#include "qemu/timer.h"
#include "system/kvm.h"
#include "vhost-user-nvme.h"

static NvmeSideWords *vring_side(NvmeVring *v)
{
    return &v->n->side[v - v->n->vrings];
}

static uint32_t vring_calls(NvmeVring *v)
{
    return le32_to_cpu(qatomic_read(&vring_side(v)->calls));
}

/* What was counted so far is told of by this. */
static void vring_interrupt(NvmeVring *v)
{
    PCIDevice *pci = PCI_DEVICE(v->n);

    if (v->n->side) {
        v->seen = vring_calls(v);
    }
    /* Without MSI-X there is no interrupt: firmware polls. */
    if (msix_enabled(pci)) {
        msix_notify(pci, v - v->n->vrings);
    }
}

/* Without KVM's help: from the main loop. */
static void vring_called(EventNotifier *e)
{
    if (event_notifier_test_and_clear(e)) {
        vring_interrupt(container_of(e, NvmeVring, call));
    }
}

/* ------------------------------------------------------------------ without the main loop */

/* Looks at the word before the clock is asked once. */
#define WATCH_LOOKS 32
/* Watches that were in vain let the next 2, 4, 8... rings pass, up to this power of two. */
#define WATCH_MISSES_MAX 5

bool nvme_watch_begin(NvmeVring *v)
{
    if (!v->n->side || !v->n->watch_us || v->irqfd || !qatomic_read(&vring_side(v)->awake)) {
        return false;
    }
    if (v->pass_over) {
        v->pass_over--;
        return false;
    }
    qatomic_set(&vring_side(v)->watching, cpu_to_le32(1));
    smp_mb();
    return true;
}

void nvme_watch_end(NvmeVring *v)
{
    int64_t end = get_clock() + v->n->watch_us * (int64_t)SCALE_US;
    bool called;
    unsigned i;

    do {
        for (i = 0; i < WATCH_LOOKS && vring_calls(v) == v->seen; i++) {
            cpu_relax();
        }
    } while (i == WATCH_LOOKS && get_clock() < end);

    /* The daemon counts, then reads this; we write it, then read the count: one of us sees the other. */
    qatomic_set(&vring_side(v)->watching, 0);
    smp_mb();
    called = v->seen != vring_calls(v);
    if (called) {
        v->missed = 0;
        vring_interrupt(v);
    } else {
        v->missed = MIN(v->missed + 1, WATCH_MISSES_MAX);
        v->pass_over = 1u << v->missed;
    }
}

/* ------------------------------------------------------------------ with KVM */

static void vring_release_irqfd(NvmeVring *v)
{
    if (v->irqfd) {
        v->irqfd = false;
        if (kvm_irqchip_remove_irqfd_notifier_gsi(kvm_state, &v->call, v->virq) < 0) {
            warn_report("%s: KVM does not let go of interrupt vector %td", v->n->name, v - v->n->vrings);
        }
    }
}

static int vring_route(NvmeVring *v, PCIDevice *pci, unsigned vector, MSIMessage msg)
{
    VuRouteChange change;
    int ret;

    if (v->virq >= 0) {
        ret = kvm_irqchip_update_msi_route(kvm_state, v->virq, msg, pci);
        if (ret >= 0) {
            kvm_irqchip_commit_routes(kvm_state);
        }
        return ret;
    }
    change = vu_route_begin();
    ret = kvm_irqchip_add_msi_route(&change, vector, pci);
    if (ret >= 0) {
        vu_route_commit(&change);
        v->virq = ret;
    }
    return ret;
}

/* A vector is unmasked: let KVM inject it. If it cannot, the main loop goes on to do it. */
static int nvme_vector_use(PCIDevice *pci, unsigned vector, MSIMessage msg)
{
    VhostUserNvme *n = VHOST_USER_NVME(pci);
    NvmeVring *v = &n->vrings[vector];

    if (vector >= n->n_vrings) {
        return 0;
    }
    vring_release_irqfd(v);
    /* KVM would deliver a signal from before, but leave it in the eventfd, to be seen again at the next mask. */
    if (event_notifier_test_and_clear(&v->call)) {
        msix_notify(pci, vector);
    }
    if (vring_route(v, pci, vector, msg) >= 0 &&
        kvm_irqchip_add_irqfd_notifier_gsi(kvm_state, &v->call, NULL, v->virq) >= 0) {
        event_notifier_set_handler(&v->call, NULL);
        v->irqfd = true;
    } else {
        event_notifier_set_handler(&v->call, vring_called);
    }
    return 0;
}

/* A vector is masked: signals stay in the eventfd, where nvme_vector_poll or the next nvme_vector_use finds them. */
static void nvme_vector_release(PCIDevice *pci, unsigned vector)
{
    VhostUserNvme *n = VHOST_USER_NVME(pci);

    if (vector < n->n_vrings) {
        vring_release_irqfd(&n->vrings[vector]);
    }
}

/* The guest looks at the pending bits. */
static void nvme_vector_poll(PCIDevice *pci, unsigned start, unsigned end)
{
    VhostUserNvme *n = VHOST_USER_NVME(pci);
    unsigned i;

    for (i = start; i < MIN(end, n->n_vrings); i++) {
        if (msix_is_masked(pci, i) && event_notifier_test_and_clear(&n->vrings[i].call)) {
            msix_set_pending(pci, i);
        }
    }
}

void nvme_vectors_to_kvm(VhostUserNvme *n)
{
    if (!n->vector_notifiers && kvm_msi_via_irqfd_enabled()) {
        n->vector_notifiers = msix_set_vector_notifiers(PCI_DEVICE(n), nvme_vector_use, nvme_vector_release,
                                                        nvme_vector_poll) == 0;
    }
}

void nvme_vectors_from_kvm(VhostUserNvme *n)
{
    unsigned i;

    if (!n->vector_notifiers) {
        return;
    }
    msix_unset_vector_notifiers(PCI_DEVICE(n));
    n->vector_notifiers = false;
    for (i = 0; i < n->n_vrings; i++) {
        NvmeVring *v = &n->vrings[i];

        /* With MSI-X off already nobody has called nvme_vector_release. */
        vring_release_irqfd(v);
        if (v->virq >= 0) {
            kvm_irqchip_release_virq(kvm_state, v->virq);
            v->virq = -1;
        }
        event_notifier_set_handler(&v->call, vring_called);
    }
}

bool nvme_vrings_init(VhostUserNvme *n, Error **errp)
{
    unsigned i;
    int ret;

    for (i = 0; i < n->n_vrings; i++) {
        NvmeVring *v = &n->vrings[i];

        v->n = n;
        v->virq = -1;
        ret = event_notifier_init(&v->call, 0);
        if (ret == 0) {
            ret = event_notifier_init(&v->kick, 0);
            if (ret < 0) {
                event_notifier_cleanup(&v->call);
            }
        }
        if (ret < 0) {
            error_setg_errno(errp, -ret, "no eventfds for %u queue pairs: see ulimit -n", n->n_vrings);
            return false;
        }
        v->made = true;
        event_notifier_set_handler(&v->call, vring_called);
    }
    return true;
}

void nvme_vrings_cleanup(VhostUserNvme *n)
{
    unsigned i;

    for (i = 0; i < n->n_vrings; i++) {
        NvmeVring *v = &n->vrings[i];

        if (v->made) {
            event_notifier_set_handler(&v->call, NULL);
            event_notifier_cleanup(&v->call);
            event_notifier_cleanup(&v->kick);
            v->made = false;
        }
    }
    n->n_vrings = 0;
}
