/*
 * The channel on which a back-end asks for mappings of its doorbell window. See vhost-user-client.h.
 *
 * Copyright (c) 2026 the vhost-user-nvme authors
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "qemu/osdep.h"

#include <sys/socket.h>

#include "qemu/main-loop.h"
#include "vhost-user-client-int.h"

enum {
    VU_BACK_SHMEM_MAP = 9,
    VU_BACK_SHMEM_UNMAP = 10,
};

typedef struct QEMU_PACKED VuMapMsg {
    uint8_t shmid;
    uint8_t padding[7];
    uint64_t fd_offset;
    uint64_t shm_offset;
    uint64_t len;
    uint64_t flags;
} VuMapMsg;

QEMU_BUILD_BUG_ON(sizeof(VuMapMsg) != VU_BACK_BODY_MAX);

#define VU_MAP_WRITABLE 0x1u

/* Requests of the back-end that are served in one go, so that a chatty one cannot keep the main loop. */
#define VU_BACK_BURST 32

/* Answers are a few bytes; a back-end that asks and never reads its answers loses the connection. */
static void back_send_answer(VuClient *c, const VuHeader *to, bool ok)
{
    struct QEMU_PACKED {
        VuHeader h;
        uint64_t status;
    } m = { { to->request, VU_FLAG_VERSION | VU_FLAG_REPLY, sizeof(uint64_t) }, !ok };
    ssize_t n;

    if (!(to->flags & VU_FLAG_NEED_REPLY)) {
        return;
    }
    do {
        n = send(c->back_fd, &m, sizeof(m), MSG_NOSIGNAL | MSG_DONTWAIT);
    } while (n < 0 && errno == EINTR);
    if (n != sizeof(m)) {
        vu_client_breakf(c, "the daemon does not read the answers to its requests");
    }
}

static void back_request(VuClient *c)
{
    VuAnswer answer = VU_ANSWER_FAILED;
    VuHeader h;
    VuMapMsg m;
    int fd = c->in_fd;

    memcpy(&h, c->in, sizeof(h));
    memcpy(&m, c->in + sizeof(h), sizeof(m));
    c->in_len = 0;
    c->in_fd = -1;

    if (h.size == sizeof(m)) {
        VuMapping map = { m.shmid, m.fd_offset, m.shm_offset, m.len, m.flags & VU_MAP_WRITABLE };

        if (h.request == VU_BACK_SHMEM_MAP && fd >= 0) {
            answer = c->ops->shmem_map(c->opaque, &map, fd);
        } else if (h.request == VU_BACK_SHMEM_UNMAP) {
            answer = c->ops->shmem_unmap(c->opaque, &map);
        }
    }
    if (fd >= 0) {
        close(fd);
    }
    if (c->back_fd < 0) {
        return;
    }
    if (answer == VU_ANSWER_LATER) {
        c->answer_to = h;
        c->answer_due = true;
        qemu_set_fd_handler(c->back_fd, NULL, NULL, NULL);
    } else {
        back_send_answer(c, &h, answer == VU_ANSWER_OK);
    }
}

/* Takes the first descriptor of a message, closes the rest. */
static void back_take_fds(VuClient *c, struct msghdr *msg)
{
    struct cmsghdr *h;

    for (h = CMSG_FIRSTHDR(msg); h; h = CMSG_NXTHDR(msg, h)) {
        size_t i, n;

        if (h->cmsg_level != SOL_SOCKET || h->cmsg_type != SCM_RIGHTS) {
            continue;
        }
        n = (h->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (i = 0; i < n; i++) {
            int fd;

            memcpy(&fd, CMSG_DATA(h) + i * sizeof(int), sizeof(fd));
            if (c->in_fd < 0) {
                c->in_fd = fd;
            } else {
                close(fd);
            }
        }
    }
}

/* Reads what there is of one message; true if it is whole. */
static bool back_read(VuClient *c)
{
    for (;;) {
        union {
            struct cmsghdr align;
            char space[CMSG_SPACE(8 * sizeof(int))];
        } control;
        struct iovec iov;
        struct msghdr msg = {
            .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.space, .msg_controllen = sizeof(control.space),
        };
        size_t want = sizeof(VuHeader);
        ssize_t n;

        if (c->in_len >= sizeof(VuHeader)) {
            VuHeader h;

            memcpy(&h, c->in, sizeof(h));
            if ((h.flags & VU_FLAG_VERSION_MASK) != VU_FLAG_VERSION || (h.flags & VU_FLAG_REPLY) ||
                h.size > sizeof(VuMapMsg)) {
                vu_client_breakf(c, "garbage on the back channel (request %u, flags 0x%x, %u bytes)", h.request,
                                 h.flags, h.size);
                return false;
            }
            want += h.size;
            if (c->in_len == want) {
                return true;
            }
        }
        iov.iov_base = c->in + c->in_len;
        iov.iov_len = want - c->in_len;
        n = recvmsg(c->back_fd, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
        if (n > 0) {
            back_take_fds(c, &msg);
            c->in_len += n;
        } else if (n == 0 || (errno != EAGAIN && errno != EINTR)) {
            vu_client_breakf(c, "the daemon closed the back channel");
            return false;
        } else if (errno == EAGAIN) {
            return false;
        }
    }
}

void vu_client_serve_pending(VuClient *c)
{
    unsigned i;

    /* A handler may run the memory listeners; those must not come back here. */
    if (c->serving) {
        return;
    }
    c->serving = true;
    for (i = 0; i < VU_BACK_BURST && c->back_fd >= 0 && !c->answer_due && back_read(c); i++) {
        back_request(c);
    }
    c->serving = false;
}

static void back_readable(void *opaque)
{
    vu_client_serve_pending(opaque);
}

void vu_client_answer(VuClient *c, bool ok)
{
    if (!vu_client_alive(c) || !c->answer_due) {
        return;
    }
    c->answer_due = false;
    qemu_set_fd_handler(c->back_fd, back_readable, NULL, c);
    back_send_answer(c, &c->answer_to, ok);
}

VuResult vu_client_open_back_channel(VuClient *c)
{
    int pair[2];
    VuResult r;

    if (!vu_client_alive(c)) {
        return VU_GONE;
    }
    /* Blocking: that is a property of both ends, and the other one is not ours. */
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) < 0) {
        vu_client_breakf(c, "no socket pair: %s", strerror(errno));
        return VU_GONE;
    }
    r = vu_client_must(c, VU_SET_BACKEND_REQ_FD, NULL, 0, pair[1]);
    close(pair[1]);
    if (r != VU_OK) {
        close(pair[0]);
        return r;
    }
    c->back_fd = pair[0];
    qemu_set_fd_handler(c->back_fd, back_readable, NULL, c);
    return VU_OK;
}

VuResult vu_client_serve_until(VuClient *c, const bool *done, const char *what)
{
    unsigned ms = vu_patience(c);
    int64_t deadline = vu_deadline(ms);

    while (vu_client_alive(c) && !*done) {
        struct pollfd p[2] = {
            { .fd = c->back_fd, .events = POLLIN },
            { .fd = c->fd, .events = 0 }, /* hang-up is always told */
        };

        if (!vu_wait_until(p, 2, deadline)) {
            vu_client_breakf(c, "%s has not come within %u ms", what, ms);
        } else if (p[0].revents) {
            vu_client_serve_pending(c);
        } else if (p[1].revents) {
            vu_client_breakf(c, "the daemon closed the connection before %s came", what);
        }
    }
    return vu_client_alive(c) ? VU_OK : VU_GONE;
}
