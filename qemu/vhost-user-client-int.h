/*
 * What the two halves of vhost-user-client share: the requests and the back channel.
 *
 * Copyright (c) 2026 the vhost-user-nvme authors
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef VHOST_USER_CLIENT_INT_H
#define VHOST_USER_CLIENT_INT_H

#include <poll.h>

#include "vhost-user-client.h"

enum {
    VU_GET_FEATURES = 1,
    VU_SET_FEATURES = 2,
    VU_SET_OWNER = 3,
    VU_SET_VRING_KICK = 12,
    VU_SET_VRING_CALL = 13,
    VU_GET_PROTOCOL_FEATURES = 15,
    VU_SET_PROTOCOL_FEATURES = 16,
    VU_GET_QUEUE_NUM = 17,
    VU_SET_VRING_ENABLE = 18,
    VU_SET_BACKEND_REQ_FD = 21,
    VU_GET_CONFIG = 24,
    VU_SET_CONFIG = 25,
    VU_RESET_DEVICE = 34,
    VU_GET_MAX_MEM_SLOTS = 36,
    VU_ADD_MEM_REG = 37,
    VU_REM_MEM_REG = 38,
    VU_GET_SHMEM_CONFIG = 44,
};

/* The header of every message: request, flags, size of what follows; little endian on all hosts we know. */
typedef struct QEMU_PACKED VuHeader {
    uint32_t request;
    uint32_t flags;
    uint32_t size;
} VuHeader;

#define VU_FLAG_VERSION 0x1u
#define VU_FLAG_VERSION_MASK 0x3u
#define VU_FLAG_REPLY 0x4u
#define VU_FLAG_NEED_REPLY 0x8u

#define VU_FEATURE_VERSION_1 (1ull << 32)
#define VU_FEATURE_PROTOCOL (1ull << 30)
#define VU_FEATURES (VU_FEATURE_VERSION_1 | VU_FEATURE_PROTOCOL)

/* The longest request of a back-end that is understood: SHMEM_MAP. */
#define VU_BACK_BODY_MAX 40

struct VuClient {
    int fd;
    int back_fd;
    bool started;
    unsigned reply_timeout_ms;
    int64_t limit;  /* the time at which all answers must have come, or 0 */
    const VuClientOps *ops;
    void *opaque;
    Error *error;   /* why it is dead, until somebody takes it */
    guint hup_watch;

    /* The back channel's message under way. */
    uint8_t in[sizeof(VuHeader) + VU_BACK_BODY_MAX];
    size_t in_len;
    int in_fd;
    bool serving;   /* a handler is on the stack */
    bool answer_due;
    VuHeader answer_to;
};

/* Sends a request, with fd if it is one. */
VuResult vu_send(VuClient *c, uint32_t request, uint32_t flags, const void *body, uint32_t size, int fd);
/* The answer to a request: between min and max bytes. */
VuResult vu_answer(VuClient *c, uint32_t request, void *body, uint32_t min, uint32_t max, uint32_t *size);
VuResult vu_get_u64(VuClient *c, uint32_t request, uint64_t *value);
VuResult vu_set_features(VuClient *c);
/* A request that is acknowledged, and whose refusal leaves nothing to go on with. */
VuResult vu_client_must(VuClient *c, uint32_t request, const void *body, uint32_t size, int fd);
/* How long to wait for an answer to what is asked now, in ms. */
unsigned vu_patience(const VuClient *c);
/* The time that many ms from now, for vu_wait_until. */
int64_t vu_deadline(unsigned ms);
/* Waits for events on one of n descriptors; false when the time is over. */
bool vu_wait_until(struct pollfd *p, nfds_t n, int64_t deadline);

#endif
