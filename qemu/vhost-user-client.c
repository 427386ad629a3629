/*
 * One connection to a vhost-user back-end. See vhost-user-client.h.
 *
 * Copyright (c) 2026 the vhost-user-nvme authors
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "qemu/osdep.h"

#include <glib-unix.h>
#include <poll.h>
#include <sys/socket.h>

#include "qapi/error.h"
#include "qemu/bswap.h"
#include "qemu/error-report.h"
#include "qemu/main-loop.h"
#include "qemu/timer.h"
#include "vhost-user-client-int.h"

static const char *const request_names[] = {
    [VU_GET_FEATURES] = "GET_FEATURES",
    [VU_SET_FEATURES] = "SET_FEATURES",
    [VU_SET_OWNER] = "SET_OWNER",
    [VU_SET_VRING_KICK] = "SET_VRING_KICK",
    [VU_SET_VRING_CALL] = "SET_VRING_CALL",
    [VU_GET_PROTOCOL_FEATURES] = "GET_PROTOCOL_FEATURES",
    [VU_SET_PROTOCOL_FEATURES] = "SET_PROTOCOL_FEATURES",
    [VU_GET_QUEUE_NUM] = "GET_QUEUE_NUM",
    [VU_SET_VRING_ENABLE] = "SET_VRING_ENABLE",
    [VU_SET_BACKEND_REQ_FD] = "SET_BACKEND_REQ_FD",
    [VU_GET_CONFIG] = "GET_CONFIG",
    [VU_SET_CONFIG] = "SET_CONFIG",
    [VU_RESET_DEVICE] = "RESET_DEVICE",
    [VU_GET_MAX_MEM_SLOTS] = "GET_MAX_MEM_SLOTS",
    [VU_ADD_MEM_REG] = "ADD_MEM_REG",
    [VU_REM_MEM_REG] = "REM_MEM_REG",
    [VU_GET_SHMEM_CONFIG] = "GET_SHMEM_CONFIG",
};

typedef struct QEMU_PACKED VuShmemConfigMsg {
    uint32_t n;
    uint32_t padding;
    uint64_t size[VU_SHMEM_MAX];
} VuShmemConfigMsg;

typedef struct QEMU_PACKED VuConfigMsg {
    uint32_t offset;
    uint32_t size;
    uint32_t flags;
    uint8_t data[VU_CONFIG_MAX];
} VuConfigMsg;

typedef struct QEMU_PACKED VuMemRegMsg {
    uint64_t padding;
    uint64_t gpa;
    uint64_t size;
    uint64_t uaddr;
    uint64_t offset;
} VuMemRegMsg;

typedef struct QEMU_PACKED VuVringStateMsg {
    uint32_t index;
    uint32_t num;
} VuVringStateMsg;

static const char *request_name(uint32_t request)
{
    const char *name = request < ARRAY_SIZE(request_names) ? request_names[request] : NULL;

    return name ? name : "a request";
}

/* ------------------------------------------------------------------ life */

static void vu_client_close(VuClient *c)
{
    if (c->hup_watch) {
        g_source_remove(c->hup_watch);
        c->hup_watch = 0;
    }
    if (c->back_fd >= 0) {
        qemu_set_fd_handler(c->back_fd, NULL, NULL, NULL);
        close(c->back_fd);
        c->back_fd = -1;
    }
    if (c->fd >= 0) {
        qemu_set_fd_handler(c->fd, NULL, NULL, NULL);
        close(c->fd);
        c->fd = -1;
    }
    if (c->in_fd >= 0) {
        close(c->in_fd);
        c->in_fd = -1;
    }
    c->in_len = 0;
    c->answer_due = false;
}

/* The end of a connection, whoever finds it first. Takes the error. */
static void vu_client_break(VuClient *c, Error *reason)
{
    if (c->fd < 0) {
        error_free(reason);
        return;
    }
    vu_client_close(c);
    if (c->started) {
        c->ops->gone(c->opaque, reason);
    } else {
        c->error = reason;
    }
}

void vu_client_breakf(VuClient *c, const char *fmt, ...)
{
    g_autofree char *text = NULL;
    Error *reason = NULL;
    va_list ap;

    va_start(ap, fmt);
    text = g_strdup_vprintf(fmt, ap);
    va_end(ap);
    error_setg(&reason, "%s", text);
    vu_client_break(c, reason);
}

void vu_client_free(VuClient *c)
{
    if (c) {
        vu_client_close(c);
        error_free(c->error);
        g_free(c);
    }
}

bool vu_client_alive(const VuClient *c)
{
    return c && c->fd >= 0;
}

Error *vu_client_take_error(VuClient *c)
{
    Error *e = g_steal_pointer(&c->error);

    if (!e) {
        error_setg(&e, "the connection is closed");
    }
    return e;
}

static gboolean vu_client_hup(gint fd, GIOCondition condition, gpointer opaque)
{
    VuClient *c = opaque;

    c->hup_watch = 0; /* removed by the return value */
    vu_client_breakf(c, "the daemon closed the connection");
    return G_SOURCE_REMOVE;
}

void vu_client_start(VuClient *c)
{
    c->started = true;
    /* Hang-up only: answers are read by whoever asked. */
    c->hup_watch = g_unix_fd_add(c->fd, G_IO_HUP | G_IO_ERR, vu_client_hup, c);
}

static void vu_client_readable(void *opaque)
{
    VuClient *c = opaque;

    qemu_set_fd_handler(c->fd, NULL, NULL, NULL);
    c->ops->answered(c->opaque);
}

void vu_client_await(VuClient *c)
{
    qemu_set_fd_handler(c->fd, vu_client_readable, NULL, c);
}

void vu_client_limit(VuClient *c, unsigned ms)
{
    c->limit = ms ? vu_deadline(ms) : 0;
}

unsigned vu_patience(const VuClient *c)
{
    int64_t left = c->limit ? MAX(c->limit - vu_deadline(0), 0) : UINT_MAX;

    return MIN(left, c->reply_timeout_ms);
}

/* ------------------------------------------------------------------ bytes */

int64_t vu_deadline(unsigned ms)
{
    return qemu_clock_get_ms(QEMU_CLOCK_REALTIME) + ms;
}

/* Waits for events on one of n descriptors; false when the time is over. */
bool vu_wait_until(struct pollfd *p, nfds_t n, int64_t deadline)
{
    for (;;) {
        int64_t left = deadline - qemu_clock_get_ms(QEMU_CLOCK_REALTIME);
        int r = poll(p, n, left > 0 ? MIN(left, INT_MAX) : 0);

        if (r > 0) {
            return true;
        }
        if (r == 0 && left <= 0) {
            return false;
        }
        if (r < 0 && errno != EINTR && errno != EAGAIN) {
            return false;
        }
    }
}

/* Sends all of buf, with fd (if it is one) on its first byte. */
static VuResult send_all(VuClient *c, const char *what, const void *buf, size_t len, int fd)
{
    unsigned ms = vu_patience(c);
    int64_t deadline = vu_deadline(ms);
    size_t done = 0;

    while (done < len) {
        union {
            struct cmsghdr align;
            char space[CMSG_SPACE(sizeof(int))];
        } control = { 0 };
        struct iovec iov = { .iov_base = (char *)buf + done, .iov_len = len - done };
        struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1 };
        ssize_t n;

        if (fd >= 0 && done == 0) {
            struct cmsghdr *h;

            msg.msg_control = control.space;
            msg.msg_controllen = sizeof(control.space);
            h = CMSG_FIRSTHDR(&msg);
            h->cmsg_level = SOL_SOCKET;
            h->cmsg_type = SCM_RIGHTS;
            h->cmsg_len = CMSG_LEN(sizeof(int));
            memcpy(CMSG_DATA(h), &fd, sizeof(int));
        }
        n = sendmsg(c->fd, &msg, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n > 0) {
            done += n;
        } else if (n < 0 && errno == EAGAIN) {
            struct pollfd p = { .fd = c->fd, .events = POLLOUT };

            if (!vu_wait_until(&p, 1, deadline)) {
                vu_client_breakf(c, "the daemon has not taken %s for %u ms", what, ms);
                return VU_GONE;
            }
        } else if (n < 0 && (errno == EPIPE || errno == ECONNRESET)) {
            vu_client_breakf(c, "the daemon closed the connection");
            return VU_GONE;
        } else if (!(n < 0 && errno == EINTR)) {
            vu_client_breakf(c, "cannot send %s: %s", what, strerror(errno));
            return VU_GONE;
        }
    }
    return VU_OK;
}

static VuResult recv_all(VuClient *c, const char *what, void *buf, size_t len)
{
    unsigned ms = vu_patience(c);
    int64_t deadline = vu_deadline(ms);
    size_t done = 0;

    while (done < len) {
        ssize_t n = recv(c->fd, (char *)buf + done, len - done, MSG_DONTWAIT);

        if (n > 0) {
            done += n;
        } else if (n == 0 || errno == ECONNRESET) {
            vu_client_breakf(c, "the daemon closed the connection during %s", what);
            return VU_GONE;
        } else if (errno == EAGAIN) {
            struct pollfd p = { .fd = c->fd, .events = POLLIN };

            if (!vu_wait_until(&p, 1, deadline)) {
                vu_client_breakf(c, "no answer to %s within %u ms", what, ms);
                return VU_GONE;
            }
        } else if (errno != EINTR) {
            vu_client_breakf(c, "cannot read the answer to %s: %s", what, strerror(errno));
            return VU_GONE;
        }
    }
    return VU_OK;
}

/* ------------------------------------------------------------------ requests */

VuResult vu_send(VuClient *c, uint32_t request, uint32_t flags, const void *body, uint32_t size, int fd)
{
    uint8_t buf[sizeof(VuHeader) + sizeof(VuConfigMsg)];
    VuHeader h = { request, VU_FLAG_VERSION | flags, size };

    if (!vu_client_alive(c)) {
        return VU_GONE;
    }
    assert(size <= sizeof(buf) - sizeof(h));
    memcpy(buf, &h, sizeof(h));
    if (size) {
        memcpy(buf + sizeof(h), body, size);
    }
    return send_all(c, request_name(request), buf, sizeof(h) + size, fd);
}

/* The answer to a request: between min and max bytes. */
VuResult vu_answer(VuClient *c, uint32_t request, void *body, uint32_t min, uint32_t max, uint32_t *size)
{
    const char *name = request_name(request);
    VuHeader h;

    if (recv_all(c, name, &h, sizeof(h)) != VU_OK) {
        return VU_GONE;
    }
    if (h.request != request || (h.flags & VU_FLAG_VERSION_MASK) != VU_FLAG_VERSION || !(h.flags & VU_FLAG_REPLY)) {
        vu_client_breakf(c, "the answer to %s is not one (request %u, flags 0x%x): is that a vhost-user back-end?",
                         name, h.request, h.flags);
        return VU_GONE;
    }
    if (h.size < min || h.size > max) {
        vu_client_breakf(c, "the answer to %s has %u bytes, not %u", name, h.size, max);
        return VU_GONE;
    }
    if (size) {
        *size = h.size;
    }
    return recv_all(c, name, body, h.size);
}

VuResult vu_get_u64(VuClient *c, uint32_t request, uint64_t *value)
{
    VuResult r = vu_send(c, request, 0, NULL, 0, -1);

    return r == VU_OK ? vu_answer(c, request, value, sizeof(*value), sizeof(*value), NULL) : r;
}

static VuResult vu_acknowledged(VuClient *c, uint32_t request)
{
    uint64_t status;
    VuResult r = vu_answer(c, request, &status, sizeof(status), sizeof(status), NULL);

    return r == VU_OK && status ? VU_REFUSED : r;
}

/* A request that is acknowledged. */
static VuResult vu_do(VuClient *c, uint32_t request, const void *body, uint32_t size, int fd)
{
    VuResult r = vu_send(c, request, VU_FLAG_NEED_REPLY, body, size, fd);

    return r == VU_OK ? vu_acknowledged(c, request) : r;
}

/* The same for a request whose refusal leaves nothing to go on with. */
VuResult vu_client_must(VuClient *c, uint32_t request, const void *body, uint32_t size, int fd)
{
    VuResult r = vu_do(c, request, body, size, fd);

    if (r == VU_REFUSED) {
        vu_client_breakf(c, "the daemon refused %s", request_name(request));
        return VU_GONE;
    }
    return r;
}

VuResult vu_client_queue_num(VuClient *c, uint64_t *n)
{
    return vu_get_u64(c, VU_GET_QUEUE_NUM, n);
}

VuResult vu_client_mem_slots(VuClient *c, uint64_t *n)
{
    return vu_get_u64(c, VU_GET_MAX_MEM_SLOTS, n);
}

VuResult vu_client_shmem_sizes(VuClient *c, VuShmemSizes *sizes)
{
    g_autofree VuShmemConfigMsg *m = g_new0(VuShmemConfigMsg, 1);
    uint32_t size = 0;
    VuResult r = vu_send(c, VU_GET_SHMEM_CONFIG, 0, NULL, 0, -1);

    if (r == VU_OK) {
        r = vu_answer(c, VU_GET_SHMEM_CONFIG, m, offsetof(VuShmemConfigMsg, size), sizeof(*m), &size);
    }
    if (r != VU_OK) {
        return r;
    }
    if (m->n > (size - offsetof(VuShmemConfigMsg, size)) / sizeof(m->size[0])) {
        vu_client_breakf(c, "the answer to GET_SHMEM_CONFIG has %u bytes for %u regions", size, m->n);
        return VU_GONE;
    }
    memset(sizes, 0, sizeof(*sizes));
    sizes->n = m->n;
    memcpy(sizes->size, m->size, m->n * sizeof(m->size[0]));
    return VU_OK;
}

VuResult vu_client_config_read(VuClient *c, uint32_t offset, void *buf, uint32_t len)
{
    VuConfigMsg m = { .offset = offset, .size = len };
    uint32_t size = offsetof(VuConfigMsg, data) + len;
    uint32_t got = 0;
    VuResult r;

    assert(len > 0 && len <= VU_CONFIG_MAX);
    r = vu_send(c, VU_GET_CONFIG, 0, &m, size, -1);
    if (r == VU_OK) {
        /* A refusal is an answer without data, or without anything. */
        r = vu_answer(c, VU_GET_CONFIG, &m, 0, size, &got);
    }
    if (r != VU_OK) {
        return r;
    }
    if (got != size || m.size != len) {
        return VU_REFUSED;
    }
    memcpy(buf, m.data, len);
    return VU_OK;
}

VuResult vu_client_config_send(VuClient *c, uint32_t offset, const void *buf, uint32_t len)
{
    VuConfigMsg m = { .offset = offset, .size = len };

    assert(len > 0 && len <= VU_CONFIG_MAX);
    memcpy(m.data, buf, len);
    return vu_send(c, VU_SET_CONFIG, VU_FLAG_NEED_REPLY, &m, offsetof(VuConfigMsg, data) + len, -1);
}

VuResult vu_client_config_sent(VuClient *c)
{
    return vu_client_alive(c) ? vu_acknowledged(c, VU_SET_CONFIG) : VU_GONE;
}

VuResult vu_client_config_write(VuClient *c, uint32_t offset, const void *buf, uint32_t len)
{
    VuResult r = vu_client_config_send(c, offset, buf, len);

    return r == VU_OK ? vu_client_config_sent(c) : r;
}

VuResult vu_client_mem_add(VuClient *c, uint64_t gpa, uint64_t size, uint64_t uaddr, uint64_t offset, int fd)
{
    VuMemRegMsg m = { 0, gpa, size, uaddr, offset };

    return vu_do(c, VU_ADD_MEM_REG, &m, sizeof(m), fd);
}

VuResult vu_client_mem_remove(VuClient *c, uint64_t gpa, uint64_t size, uint64_t uaddr, uint64_t offset)
{
    VuMemRegMsg m = { 0, gpa, size, uaddr, offset };

    return vu_do(c, VU_REM_MEM_REG, &m, sizeof(m), -1);
}

static VuResult vu_vring(VuClient *c, uint32_t request, const void *body, uint32_t size, int fd, bool ack)
{
    return ack ? vu_client_must(c, request, body, size, fd) : vu_send(c, request, 0, body, size, fd);
}

VuResult vu_client_vring_call(VuClient *c, unsigned index, EventNotifier *e, bool ack)
{
    uint64_t v = index;

    return vu_vring(c, VU_SET_VRING_CALL, &v, sizeof(v), event_notifier_get_fd(e), ack);
}

VuResult vu_client_vring_kick(VuClient *c, unsigned index, EventNotifier *e, bool ack)
{
    uint64_t v = index;

    return vu_vring(c, VU_SET_VRING_KICK, &v, sizeof(v), event_notifier_get_fd(e), ack);
}

VuResult vu_client_vring_enable(VuClient *c, unsigned index, bool on, bool ack)
{
    VuVringStateMsg m = { index, on };

    return vu_vring(c, VU_SET_VRING_ENABLE, &m, sizeof(m), -1, ack);
}

VuResult vu_set_features(VuClient *c)
{
    uint64_t features = VU_FEATURES;

    return vu_client_must(c, VU_SET_FEATURES, &features, sizeof(features), -1);
}

VuResult vu_client_reset(VuClient *c)
{
    VuResult r = vu_client_must(c, VU_RESET_DEVICE, NULL, 0, -1);

    return r == VU_OK ? vu_set_features(c) : r;
}
