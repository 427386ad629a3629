/*
 * One connection to a vhost-user back-end: framing, time limits, file descriptors, and the channel on which the
 * back-end asks for mappings. It knows the protocol's messages and nothing of NVMe or PCI.
 *
 * All functions want the big QEMU lock. A connection that breaks (closed, garbage, no answer in time) stays as a dead
 * object: requests on it fail at once, and the owner is told once. A new attempt is a new VuClient.
 *
 * Copyright (c) 2026 the vhost-user-nvme authors
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef VHOST_USER_CLIENT_H
#define VHOST_USER_CLIENT_H

#include "qemu/event_notifier.h"

/* The most registers or configuration bytes one message carries. */
#define VU_CONFIG_MAX 256
/* The most shared memory regions a back-end can have. */
#define VU_SHMEM_MAX 256

typedef struct VuClient VuClient;

/* What a request came to. */
typedef enum VuResult {
    VU_OK,
    VU_REFUSED, /* the back-end answered with a failure; the connection lives */
    VU_GONE,    /* there is no connection (any more); see vu_client_take_error */
} VuResult;

/* A mapping that the back-end asks for, as it came: nothing in it is checked. */
typedef struct VuMapping {
    uint8_t shmid;
    uint64_t fd_offset;
    uint64_t shm_offset;
    uint64_t len;
    bool writable;
} VuMapping;

typedef enum VuAnswer {
    VU_ANSWER_OK,
    VU_ANSWER_FAILED,
    VU_ANSWER_LATER, /* vu_client_answer follows; no further request is served before it */
} VuAnswer;

typedef struct VuClientOps {
    /* fd is the callee's to use during the call, and closed afterwards. */
    VuAnswer (*shmem_map)(void *opaque, const VuMapping *m, int fd);
    VuAnswer (*shmem_unmap)(void *opaque, const VuMapping *m);
    /*
     * The connection broke, after vu_client_start. Called once, from any place that used the connection (also from
     * inside a memory transaction); the error is the callee's to free.
     */
    void (*gone)(void *opaque, Error *reason);
    /* What vu_client_await waited for: an answer can be read, or the connection is at its end. */
    void (*answered)(void *opaque);
} VuClientOps;

typedef struct VuShmemSizes {
    uint32_t n;
    uint64_t size[VU_SHMEM_MAX];
} VuShmemSizes;

/*
 * Connects and negotiates (GET_FEATURES to SET_FEATURES). Tries for connect_timeout_ms while nobody listens yet, at
 * least once, and says so in the name of `name`; every answer of the back-end must come within reply_timeout_ms, those of
 * the negotiation within connect_timeout_ms if that is longer. NULL with an error if that fails or the back-end lacks something.
 */
VuClient *vu_client_connect(const char *path, const char *name, unsigned connect_timeout_ms, unsigned reply_timeout_ms,
                            const VuClientOps *ops, void *opaque, Error **errp);
/*
 * The same in steps that do not wait: connects if somebody listens, and asks for the features; when the back-end has
 * answered (vu_client_await), vu_client_negotiate does the rest.
 */
VuClient *vu_client_open(const char *path, unsigned reply_timeout_ms, const VuClientOps *ops, void *opaque, Error **errp);
VuResult vu_client_negotiate(VuClient *c);
/* Calls answered() once, from the main loop. */
void vu_client_await(VuClient *c);
/* All answers from now on must come within so many ms in sum; 0 = no limit but the reply timeout for each. */
void vu_client_limit(VuClient *c, unsigned ms);
/* Closes the connection without a call of gone(). */
void vu_client_free(VuClient *c);
/* All is set up: from now on a broken connection is noticed by itself and told to gone(). */
void vu_client_start(VuClient *c);
bool vu_client_alive(const VuClient *c);
/* The end of a connection, whoever finds it first, with the reason. */
void G_GNUC_PRINTF(2, 3) vu_client_breakf(VuClient *c, const char *fmt, ...);
/* Why the connection is dead, before vu_client_start; never NULL on a dead one. The caller frees it. */
Error *vu_client_take_error(VuClient *c);

/* Opens the back channel (SET_BACKEND_REQ_FD); requests are served from the main loop from then on. */
VuResult vu_client_open_back_channel(VuClient *c);
/* Serves the back channel until *done or for at most the reply timeout, which breaks the connection. */
VuResult vu_client_serve_until(VuClient *c, const bool *done, const char *what);
/* Serves the requests that lie in the back channel now, without waiting. */
void vu_client_serve_pending(VuClient *c);
/* The answer that VU_ANSWER_LATER promised. */
void vu_client_answer(VuClient *c, bool ok);

VuResult vu_client_queue_num(VuClient *c, uint64_t *n);
VuResult vu_client_shmem_sizes(VuClient *c, VuShmemSizes *sizes);
VuResult vu_client_mem_slots(VuClient *c, uint64_t *n);
/* len <= VU_CONFIG_MAX, as for writes. */
VuResult vu_client_config_read(VuClient *c, uint32_t offset, void *buf, uint32_t len);
/* Acknowledged: the back-end has done it, and answers for it. */
VuResult vu_client_config_write(VuClient *c, uint32_t offset, const void *buf, uint32_t len);
/* The same in two steps; nothing else may be asked in between. */
VuResult vu_client_config_send(VuClient *c, uint32_t offset, const void *buf, uint32_t len);
VuResult vu_client_config_sent(VuClient *c);
VuResult vu_client_mem_add(VuClient *c, uint64_t gpa, uint64_t size, uint64_t uaddr, uint64_t offset, int fd);
VuResult vu_client_mem_remove(VuClient *c, uint64_t gpa, uint64_t size, uint64_t uaddr, uint64_t offset);
/* These three: without `ack` nobody waits for an acknowledgement; one that is refused shows in what comes after. */
VuResult vu_client_vring_call(VuClient *c, unsigned index, EventNotifier *e, bool ack);
VuResult vu_client_vring_kick(VuClient *c, unsigned index, EventNotifier *e, bool ack);
VuResult vu_client_vring_enable(VuClient *c, unsigned index, bool on, bool ack);
/* RESET_DEVICE, then SET_FEATURES, which it may have cleared. */
VuResult vu_client_reset(VuClient *c);

#endif
