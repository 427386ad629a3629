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

/* The longest request of a back-end that is understood: SHMEM_MAP. */
#define VU_BACK_BODY_MAX 40

struct VuClient {
    int fd;
    int back_fd;
    bool started;
    unsigned reply_timeout_ms;
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

/* The end of a connection, whoever finds it first, with the reason. */
void G_GNUC_PRINTF(2, 3) vu_client_breakf(VuClient *c, const char *fmt, ...);
/* A request that is acknowledged, and whose refusal leaves nothing to go on with. */
VuResult vu_client_must(VuClient *c, uint32_t request, const void *body, uint32_t size, int fd);
/* The time that many ms from now, for vu_wait_until. */
int64_t vu_deadline(unsigned ms);
/* Waits for events on one of n descriptors; false when the time is over. */
bool vu_wait_until(struct pollfd *p, nfds_t n, int64_t deadline);

#endif
