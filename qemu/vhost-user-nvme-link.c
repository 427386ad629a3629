/*
 * The connection of the device vhost-user-nvme: made when the device is, and again whenever the daemon is gone.
 *
 * Copyright (c) 2026 the vhost-user-nvme authors
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "qemu/osdep.h"

#include "qapi/error.h"
#include "qemu/error-report.h"
#include "qemu/main-loop.h"
#include "qemu/units.h"
#include "vhost-user-nvme.h"

/* The front-end page. */
#define PAGE_MAGIC 0x454d564eu /* "NVME" */
#define PAGE_VERSION 2
#define PAGE_INSTANCE_ID 0xf20
#define PAGE_GO 0xf30
#define GO_ALL_SENT 0x1u
#define GO_USED 0x2u    /* the guest has used this device over an earlier connection */
#define PAGE_KEPT 0xf34
#define KEPT_UNUSABLE 2 /* the daemon cannot go on with what was there */

typedef struct QEMU_PACKED FrontendPage {
    uint32_t magic;
    uint32_t version;
    uint32_t window_size;
    uint16_t vrings;
    uint16_t reserved;
    uint16_t vendor;
    uint16_t device;
    uint16_t subsystem_vendor;
    uint16_t subsystem;
    uint8_t revision;
    uint8_t reserved2[3];
    uint32_t side_offset; /* of the side words in the window's file; 0 = none */
} FrontendPage;
QEMU_BUILD_BUG_ON(offsetof(FrontendPage, vendor) != 0x10);
QEMU_BUILD_BUG_ON(offsetof(FrontendPage, revision) != 0x18);
QEMU_BUILD_BUG_ON(offsetof(FrontendPage, side_offset) != 0x1c);

/* CAP.DSTRD is a power of two from 4 bytes to 128 KiB; more than the largest window is nobody's. */
#define MAX_WINDOW (MAX_VRINGS * (8u << 15))

/* The main loop waits so long for a daemon that answers and then hangs, not counting its look at the guest's memory. */
#define HANDSHAKE_MS 1000
/* Between two attempts passes an eighth of the time since the loss, but no more than this (or reconnect-delay). */
#define RETRY_MAX_MS 1000
/* And if an attempt made the main loop wait, so many times as long. */
#define RETRY_PER_BLOCKED 4

/* A plug that waits holds up the whole machine. */
#define HOTPLUG_WAIT_MS 1000

static unsigned cap_dstrd(uint64_t cap)
{
    return (cap >> 32) & 0xf;
}

static unsigned cap_entries(uint64_t cap)
{
    return (cap & 0xffff) + 1;
}

/* ------------------------------------------------------------------ what the daemon is */

static bool take_error(VhostUserNvme *n, Error **errp)
{
    error_propagate(errp, vu_client_take_error(n->client));
    return false;
}

/* Reads what the daemon says of itself, and believes what is possible. */
static bool read_shape(VhostUserNvme *n, NvmeShape *shape, Error **errp)
{
    g_autofree VuShmemSizes *shmem = g_new0(VuShmemSizes, 1);
    FrontendPage page;
    uint8_t cap[8];
    uint64_t queues;
    VuResult r;

    r = vu_client_queue_num(n->client, &queues);
    if (r == VU_OK) {
        r = vu_client_shmem_sizes(n->client, shmem);
    }
    if (r == VU_OK) {
        r = vu_client_config_read(n->client, NVME_FRONTEND_PAGE, &page, sizeof(page));
    }
    if (r == VU_OK) {
        r = vu_client_config_read(n->client, NVME_REG_CAP, cap, sizeof(cap));
    }
    if (r == VU_GONE) {
        return take_error(n, errp);
    }
    if (r != VU_OK || le32_to_cpu(page.magic) != PAGE_MAGIC) {
        error_setg(errp, "the back-end is no NVMe controller");
        return false;
    }
    if (le32_to_cpu(page.version) != PAGE_VERSION) {
        error_setg(errp, "the daemon speaks version %u of the front-end page, this QEMU version %u",
                   le32_to_cpu(page.version), PAGE_VERSION);
        return false;
    }
    *shape = (NvmeShape) {
        .cap = ldq_le_p(cap),
        .n_vrings = le16_to_cpu(page.vrings),
        .window_size = le32_to_cpu(page.window_size),
        .side_offset = le32_to_cpu(page.side_offset),
        .vendor = le16_to_cpu(page.vendor),
        .device = le16_to_cpu(page.device),
        .subsystem_vendor = le16_to_cpu(page.subsystem_vendor),
        .subsystem = le16_to_cpu(page.subsystem),
        .revision = page.revision,
    };
    if (shape->n_vrings < 1 || shape->n_vrings > MAX_VRINGS || queues != shape->n_vrings) {
        error_setg(errp, "the daemon has %u (or %" PRIu64 ") queue pairs, not 1 to %u", shape->n_vrings, queues,
                   MAX_VRINGS);
        return false;
    }
    if (shape->side_offset % qemu_real_host_page_size()) {
        error_setg(errp, "the daemon's side words at 0x%x do not begin a page", shape->side_offset);
        return false;
    }
    if (shape->window_size < 4 * KiB || shape->window_size > MAX_WINDOW || shape->window_size % (4 * KiB) ||
        shape->window_size % qemu_real_host_page_size()) {
        error_setg(errp, "the daemon's doorbell window of 0x%zx bytes is not a multiple of 4 KiB up to 0x%x",
                   shape->window_size, MAX_WINDOW);
        return false;
    }
    if (shmem->n != 2 || shmem->size[0] != shape->window_size || shmem->size[1] != shape->window_size) {
        error_setg(errp, "the daemon's shared memory regions are not two of the doorbell window's size");
        return false;
    }
    return true;
}

/* The guest has seen one shape, and keeps it: a daemon with another one cannot take its place. */
static bool check_shape(VhostUserNvme *n, Error **errp)
{
    const NvmeShape *is = &n->shape;
    NvmeShape shape;

    if (!read_shape(n, &shape, errp)) {
        return false;
    }
    if (shape.n_vrings != is->n_vrings) {
        error_setg(errp, "the daemon has %u queue pairs, this device %u (%s)", shape.n_vrings, is->n_vrings,
                   n->met ? "the daemon's 'queues' may not change while the VM runs" : "its property 'queues'");
    } else if (cap_dstrd(shape.cap) != cap_dstrd(is->cap)) {
        error_setg(errp, "the daemon's doorbell stride is %u, this device's %u (%s)", cap_dstrd(shape.cap),
                   cap_dstrd(is->cap), n->met ? "the daemon's 'doorbell-stride' may not change while the VM runs" :
                                                "its property 'doorbell-stride'");
    } else if (shape.window_size != is->window_size) {
        error_setg(errp, "the daemon's doorbell window has 0x%zx bytes, this device's 0x%zx", shape.window_size,
                   is->window_size);
    } else if (!n->met && cap_entries(shape.cap) < cap_entries(is->cap)) {
        error_setg(errp, "the daemon's queues have at most %u entries, this device said %u (its property "
                   "'queue-entries')", cap_entries(shape.cap), cap_entries(is->cap));
    } else {
        n->shape.side_offset = shape.side_offset;
        return true;
    }
    return false;
}

/* ------------------------------------------------------------------ steps of a connection */

static bool enable_vrings(VhostUserNvme *n, bool ack)
{
    unsigned i;

    for (i = 0; i < n->n_vrings; i++) {
        if (vu_client_vring_enable(n->client, i, true, ack) != VU_OK) {
            return false;
        }
    }
    return true;
}

/* Steps 7 to 10 of the connection; `limit` is for all but the memory. */
static bool attach(VhostUserNvme *n, unsigned limit, Error **errp)
{
    /* What a daemon took once it takes again: while a guest waits, a hundred answers are not waited for. */
    bool ack = !n->met;
    unsigned i;

    if (vu_client_config_write(n->client, PAGE_INSTANCE_ID, n->instance_id.data, sizeof(n->instance_id.data)) == VU_GONE ||
        vu_client_open_back_channel(n->client) != VU_OK ||
        vu_client_serve_until(n->client, &n->window_mapped, "the doorbell window") != VU_OK) {
        return take_error(n, errp);
    }
    /* The first of an SSD's guests has its memory pinned, which takes as long as there is memory. */
    vu_client_limit(n->client, 0);
    vu_memory_free(n->memory);
    n->memory = vu_memory_new(n->client, n->name, errp);
    if (!n->memory) {
        return false;
    }
    vu_client_limit(n->client, limit);
    for (i = 0; i < n->n_vrings; i++) {
        if (vu_client_vring_call(n->client, i, &n->vrings[i].call, ack) != VU_OK ||
            vu_client_vring_kick(n->client, i, &n->vrings[i].kick, ack) != VU_OK) {
            return take_error(n, errp);
        }
    }
    return enable_vrings(n, ack) || take_error(n, errp);
}

/* Step 11: everything has been sent. The answer comes when the daemon serves. */
static VuResult send_go(VhostUserNvme *n)
{
    uint8_t kept[4], go[4];

    if (vu_client_config_read(n->client, PAGE_KEPT, kept, sizeof(kept)) == VU_OK && n->used &&
        ldl_le_p(kept) == KEPT_UNUSABLE) {
        warn_report("%s: the daemon cannot go on with what the guest had there: the guest is told that its controller failed, "
                    "and has to reset it", n->name);
    }
    stl_le_p(go, GO_ALL_SENT | (n->used ? GO_USED : 0));
    return vu_client_config_send(n->client, PAGE_GO, go, sizeof(go));
}

/* The daemon serves. What came to nobody while it did not is sent, rung and injected now. */
static VuResult go_on(VhostUserNvme *n)
{
    unsigned i;

    if (nvme_regs_resume(n) != VU_OK) {
        return VU_GONE;
    }
    for (i = 0; i < n->n_vrings && n->met; i++) {
        event_notifier_set(&n->vrings[i].kick);
        event_notifier_set(&n->vrings[i].call);
    }
    n->link = NVME_LINK_UP;
    n->met = true;
    return VU_OK;
}

/* ------------------------------------------------------------------ again and again */

static int64_t now_ms(void)
{
    return qemu_clock_get_ms(QEMU_CLOCK_REALTIME);
}

static void try_after(VhostUserNvme *n, int64_t ms)
{
    timer_mod(n->timer, now_ms() + ms);
}

/* Told once for each loss: attempts that fail for the same reason are many. */
static void tell(VhostUserNvme *n, Error *reason)
{
    if (n->told) {
        error_free(reason);
    } else {
        n->told = true;
        warn_reportf_err(reason, "%s: the daemon cannot be used yet, and is tried again: ", n->name);
    }
}

/* No connection, or none any more. */
static void let_go(VhostUserNvme *n)
{
    n->link = NVME_LINK_AWAY;
    n->window_mapped = false;
    n->fence = NULL;
    if (n->memory) {
        vu_memory_detach(n->memory);
    }
}

static void attempt_over(VhostUserNvme *n)
{
    int64_t delay = (now_ms() - n->lost_at) / 8;

    delay = MIN(delay, MAX(RETRY_MAX_MS, n->reconnect_delay));
    delay = MAX(delay, n->reconnect_delay);
    let_go(n);
    vu_client_free(n->client);
    n->client = NULL;
    try_after(n, MAX(delay, n->blocked * RETRY_PER_BLOCKED));
}

static const VuClientOps nvme_client_ops;

static void attempt(VhostUserNvme *n)
{
    Error *err = NULL;

    n->blocked = 0;
    /* A dead one is not freed where it breaks, since it is in use there. */
    vu_client_free(n->client);
    n->client = vu_client_open(n->socket, n->reply_timeout, &nvme_client_ops, n, &err);
    if (!n->client) {
        /* That nobody is there has been said; that we may not go there has not. */
        if (error_get_class(err) == ERROR_CLASS_DEVICE_NOT_FOUND) {
            error_free(err);
        } else {
            tell(n, err);
        }
        attempt_over(n);
        return;
    }
    /* A daemon that serves another front-end, or is not ready, answers later: nobody waits for that. */
    n->link = NVME_LINK_ASKED;
    vu_client_await(n->client);
    timer_mod(n->timer, now_ms() + n->reply_timeout);
}

/* It has answered the first request: it is awake, and the rest takes it a moment. */
static void handshake(VhostUserNvme *n)
{
    int64_t begin = now_ms();
    Error *err = NULL;
    bool ok;

    timer_del(n->timer);
    vu_client_limit(n->client, HANDSHAKE_MS);
    if (vu_client_negotiate(n->client) != VU_OK) {
        ok = take_error(n, &err);
    } else {
        ok = check_shape(n, &err) && attach(n, HANDSHAKE_MS, &err) && (send_go(n) == VU_OK || take_error(n, &err));
    }
    vu_client_limit(n->client, 0);
    if (!ok) {
        tell(n, err);
        n->blocked = now_ms() - begin;
        let_go(n);
        vu_client_free(n->client);
        n->client = NULL;
        qemu_bh_schedule(n->gone_bh);
        return;
    }
    /* How long it takes to go on depends on what was under way: nobody waits for that either. */
    n->link = NVME_LINK_RESUMING;
    vu_client_start(n->client);
    vu_client_await(n->client);
    timer_mod(n->timer, now_ms() + n->reply_timeout);
}

static void resumed(VhostUserNvme *n)
{
    bool first = !n->met;

    timer_del(n->timer);
    switch (vu_client_config_sent(n->client)) {
    case VU_OK:
        break;
    case VU_REFUSED:
        vu_client_breakf(n->client, "the daemon refuses to go on");
        return;
    case VU_GONE:
        return;
    }
    if (go_on(n) != VU_OK) {
        return;
    }
    n->told = false;
    if (first) {
        info_report("%s: the daemon is there", n->name);
    } else {
        info_report("%s: the daemon is back after %" PRId64 " ms", n->name, now_ms() - n->lost_at);
    }
}

static void link_answered(void *opaque)
{
    VhostUserNvme *n = opaque;

    if (n->link == NVME_LINK_ASKED) {
        handshake(n);
    } else if (n->link == NVME_LINK_RESUMING) {
        resumed(n);
    }
}

static void link_timer(void *opaque)
{
    VhostUserNvme *n = opaque;
    Error *err = NULL;

    switch (n->link) {
    case NVME_LINK_AWAY:
        attempt(n);
        break;
    case NVME_LINK_ASKED:
        error_setg(&err, "no answer to GET_FEATURES within %u ms", n->reply_timeout);
        tell(n, err);
        attempt_over(n);
        break;
    case NVME_LINK_RESUMING:
        vu_client_breakf(n->client, "it has not gone on within %u ms", n->reply_timeout);
        break;
    default:
        break;
    }
}

/* ------------------------------------------------------------------ the end of a connection */

/* May be called from inside a memory transaction, and of a request: what changes the map, and frees, waits. */
static void link_gone(void *opaque, Error *reason)
{
    VhostUserNvme *n = opaque;
    bool was_up = n->link == NVME_LINK_UP;

    timer_del(n->timer);
    let_go(n);
    if (!n->reconnect_delay) {
        n->link = NVME_LINK_LOST;
        warn_reportf_err(reason, "%s: the disk is gone, its registers read as all ones: ", n->name);
    } else {
        if (was_up) {
            n->lost_at = now_ms();
            n->told = false;
            warn_reportf_err(reason, "%s: the daemon is gone, I/O waits until it is back: ", n->name);
        } else {
            tell(n, reason);
        }
    }
    qemu_bh_schedule(n->gone_bh);
}

static void link_gone_bh(void *opaque)
{
    VhostUserNvme *n = opaque;

    if (n->link == NVME_LINK_LOST) {
        nvme_window_show(n, false);
        nvme_side_unmap(n);
        nvme_window_abandon(n);
    } else if (nvme_window_take_back(n)) {
        nvme_link_trapped(n);
    }
}

void nvme_link_trapped(VhostUserNvme *n)
{
    if (n->link != NVME_LINK_AWAY) {
        return;
    }
    /* At once if it was just lost. */
    if (n->told) {
        attempt_over(n);
    } else {
        try_after(n, 0);
    }
}

static const VuClientOps nvme_client_ops = {
    .shmem_map = nvme_window_map,
    .shmem_unmap = nvme_window_unmap,
    .gone = link_gone,
    .answered = link_answered,
};

/* ------------------------------------------------------------------ the device comes and goes */

static void link_init(VhostUserNvme *n)
{
    n->gone_bh = qemu_bh_new_guarded(link_gone_bh, n, &DEVICE(n)->mem_reentrancy_guard);
    n->timer = timer_new_ms(QEMU_CLOCK_REALTIME, link_timer, n);
    n->link = NVME_LINK_AWAY;
    n->lost_at = now_ms();
}

bool nvme_link_open(VhostUserNvme *n, Error **errp)
{
    unsigned patience = n->connect_timeout;

    if (DEVICE(n)->hotplugged) {
        patience = MIN(patience, HOTPLUG_WAIT_MS);
    }
    link_init(n);
    n->client = vu_client_connect(n->socket, n->name, patience, n->reply_timeout, &nvme_client_ops, n, errp);
    return n->client && read_shape(n, &n->shape, errp);
}

bool nvme_link_finish(VhostUserNvme *n, Error **errp)
{
    if (!attach(n, 0, errp)) {
        return false;
    }
    switch (send_go(n) == VU_OK ? vu_client_config_sent(n->client) : VU_GONE) {
    case VU_OK:
        break;
    case VU_REFUSED:
        error_setg(errp, "the daemon refuses to go on");
        return false;
    case VU_GONE:
        return take_error(n, errp);
    }
    if (go_on(n) != VU_OK) {
        return take_error(n, errp);
    }
    vu_client_start(n->client);
    return true;
}

bool nvme_link_assume(VhostUserNvme *n, Error **errp)
{
    uint64_t window = (8ull << n->doorbell_stride) * n->queues;

    if (n->queues < 2 || n->queues > MAX_VRINGS) {
        error_setg(errp, "'queues' is %u, not 2 to %u", n->queues, MAX_VRINGS);
        return false;
    }
    if (n->queue_entries < 2 || n->queue_entries > 65536) {
        error_setg(errp, "'queue-entries' is %u, not 2 to 65536", n->queue_entries);
        return false;
    }
    if (n->doorbell_stride > 10) {
        error_setg(errp, "'doorbell-stride' is %u, not 0 to 10", n->doorbell_stride);
        return false;
    }
    link_init(n);
    n->shape = (NvmeShape) {
        /* CRQ, NVM command set; a minute to become ready in, which the daemon has to come in. */
        .cap = (n->queue_entries - 1) | 1u << 16 | 120u << 24 | (uint64_t)n->doorbell_stride << 32 | 1ull << 37,
        .n_vrings = n->queues,
        .window_size = ROUND_UP(window, 4 * KiB),
        /* What the daemon says if it is not told otherwise. */
        .vendor = 0x1af4,
        .device = 0x10f0,
        .subsystem_vendor = 0x1af4,
        .subsystem = 0x1100,
    };
    return true;
}

bool nvme_link_later(VhostUserNvme *n, Error **errp)
{
    /* Memory that cannot be shared is said now. */
    n->memory = vu_memory_new(NULL, n->name, errp);
    if (!n->memory) {
        return false;
    }
    try_after(n, 0);
    return true;
}

void nvme_link_settle(VhostUserNvme *n)
{
    if (n->link == NVME_LINK_RESUMING) {
        resumed(n);
    }
}

bool nvme_link_reset(VhostUserNvme *n)
{
    if (vu_client_reset(n->client) != VU_OK) {
        return false;
    }
    /* A wish for mapped mode from before the reset is granted and forgotten. */
    vu_client_serve_pending(n->client);
    return enable_vrings(n, true);
}

void nvme_link_close(VhostUserNvme *n)
{
    vu_memory_free(n->memory);
    n->memory = NULL;
    vu_client_free(n->client);
    n->client = NULL;
    n->fence = NULL;
    n->window_mapped = false;
    n->link = NVME_LINK_LOST;
    if (n->timer) {
        timer_free(n->timer);
        n->timer = NULL;
    }
    if (n->gone_bh) {
        qemu_bh_delete(n->gone_bh);
        n->gone_bh = NULL;
    }
    nvme_side_unmap(n);
}
