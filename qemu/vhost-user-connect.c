/*
 * How a connection to a vhost-user back-end begins. See vhost-user-client.h.
 *
 * Copyright (c) 2026 the vhost-user-nvme authors
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "qemu/osdep.h"

#include <sys/socket.h>
#include <sys/un.h>

#include "qapi/error.h"
#include "qemu/error-report.h"
#include "vhost-user-client-int.h"

/* The protocol features this device cannot do without. */
static const struct {
    unsigned bit;
    const char *name;
} needed[] = {
    { 0, "MQ" },
    { 3, "REPLY_ACK" },
    { 5, "BACKEND_REQ" },
    { 9, "CONFIG" },
    { 10, "BACKEND_SEND_FD" },
    { 13, "RESET_DEVICE" },
    { 15, "CONFIGURE_MEM_SLOTS" },
    { 22, "SHMEM" },
};

static int connect_once(const char *path)
{
    struct sockaddr_un un = { .sun_family = AF_UNIX };
    int fd, e;

    /* Checked by the caller to fit. */
    memcpy(un.sun_path, path, strlen(path));
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0) {
        return -errno;
    }
    /* A local socket connects at once or not at all; EAGAIN is a full queue of waiting front-ends. */
    if (connect(fd, (struct sockaddr *)&un, sizeof(un)) < 0) {
        e = errno;
        close(fd);
        return -e;
    }
    return fd;
}

/* Nobody is there yet, or too many are: it may work a moment later. */
static bool may_come(int fd)
{
    return fd == -ENOENT || fd == -ECONNREFUSED || fd == -EAGAIN || fd == -EINTR;
}

static bool path_fits(const char *path, Error **errp)
{
    struct sockaddr_un un;

    if (strlen(path) >= sizeof(un.sun_path)) {
        error_setg(errp, "the path '%s' is longer than the %zu bytes that a socket's may have", path,
                   sizeof(un.sun_path) - 1);
        return false;
    }
    return true;
}

/* Of the class DEVICE_NOT_FOUND if nobody is there, which time alone may mend. */
static void connect_error(const char *path, int fd, Error **errp)
{
    switch (-fd) {
    case ENOENT:
        error_set(errp, ERROR_CLASS_DEVICE_NOT_FOUND, "there is no socket '%s': is vhost-user-nvme running?", path);
        break;
    case ECONNREFUSED:
        error_set(errp, ERROR_CLASS_DEVICE_NOT_FOUND, "nobody listens on '%s': is vhost-user-nvme running?", path);
        break;
    case EACCES:
    case EPERM:
        error_setg(errp, "no permission to connect to '%s': it needs write access to the socket", path);
        break;
    default:
        error_setg_errno(errp, -fd, "cannot connect to '%s'", path);
        break;
    }
}

/* After so long whoever waits is told what for. */
#define QUIET_MS 500

static int connect_for(const char *path, const char *name, unsigned ms, Error **errp)
{
    int64_t deadline = vu_deadline(ms), tell = ms > QUIET_MS ? vu_deadline(QUIET_MS) : INT64_MAX;
    int fd;

    while ((fd = connect_once(path)) < 0 && may_come(fd) && vu_deadline(0) < deadline) {
        if (vu_deadline(0) >= tell) {
            info_report("%s: waiting for the daemon on '%s' (for %u ms at most)", name, path, ms);
            tell = INT64_MAX;
        }
        g_usleep(20 * 1000);
    }
    if (fd < 0) {
        connect_error(path, fd, errp);
    }
    return fd;
}

static VuResult ask_for_features(VuClient *c)
{
    return vu_send(c, VU_GET_FEATURES, 0, NULL, 0, -1);
}

VuResult vu_client_negotiate(VuClient *c)
{
    uint64_t features, offered, wanted = 0;
    size_t i;

    if (!vu_client_alive(c) ||
        vu_answer(c, VU_GET_FEATURES, &features, sizeof(features), sizeof(features), NULL) != VU_OK) {
        return VU_GONE;
    }
    if ((features & VU_FEATURES) != VU_FEATURES) {
        vu_client_breakf(c, "the back-end lacks the feature %s",
                         features & VU_FEATURE_PROTOCOL ? "VIRTIO_F_VERSION_1" : "VHOST_USER_F_PROTOCOL_FEATURES");
        return VU_GONE;
    }
    if (vu_get_u64(c, VU_GET_PROTOCOL_FEATURES, &offered) != VU_OK) {
        return VU_GONE;
    }
    for (i = 0; i < ARRAY_SIZE(needed); i++) {
        wanted |= 1ull << needed[i].bit;
        if (!(offered & (1ull << needed[i].bit))) {
            vu_client_breakf(c, "the back-end lacks the protocol feature %s: is it vhost-user-nvme?", needed[i].name);
            return VU_GONE;
        }
    }
    /* REPLY_ACK is not on yet. */
    if (vu_send(c, VU_SET_PROTOCOL_FEATURES, 0, &wanted, sizeof(wanted), -1) != VU_OK) {
        return VU_GONE;
    }
    if (vu_client_must(c, VU_SET_OWNER, NULL, 0, -1) != VU_OK) {
        return VU_GONE;
    }
    return vu_set_features(c);
}

static VuClient *vu_client_new(int fd, unsigned reply_timeout_ms, const VuClientOps *ops, void *opaque)
{
    VuClient *c = g_new0(VuClient, 1);

    c->fd = fd;
    c->back_fd = c->in_fd = -1;
    c->ops = ops;
    c->opaque = opaque;
    c->reply_timeout_ms = reply_timeout_ms;
    return c;
}

VuClient *vu_client_open(const char *path, unsigned reply_timeout_ms, const VuClientOps *ops, void *opaque, Error **errp)
{
    VuClient *c;
    int fd;

    if (!path_fits(path, errp)) {
        return NULL;
    }
    fd = connect_once(path);
    if (fd < 0) {
        connect_error(path, fd, errp);
        return NULL;
    }
    c = vu_client_new(fd, reply_timeout_ms, ops, opaque);
    if (ask_for_features(c) != VU_OK) {
        error_propagate(errp, vu_client_take_error(c));
        vu_client_free(c);
        return NULL;
    }
    return c;
}

VuClient *vu_client_connect(const char *path, const char *name, unsigned connect_timeout_ms, unsigned reply_timeout_ms,
                            const VuClientOps *ops, void *opaque, Error **errp)
{
    VuClient *c;
    int fd;

    if (!path_fits(path, errp)) {
        return NULL;
    }
    fd = connect_for(path, name, connect_timeout_ms, errp);
    if (fd < 0) {
        return NULL;
    }
    /* A back-end that serves another front-end lets us wait here. */
    c = vu_client_new(fd, MAX(connect_timeout_ms, reply_timeout_ms), ops, opaque);
    if (ask_for_features(c) != VU_OK || vu_client_negotiate(c) != VU_OK) {
        Error *e = vu_client_take_error(c);

        error_propagate_prepend(errp, e, "'%s': ", path);
        vu_client_free(c);
        return NULL;
    }
    c->reply_timeout_ms = reply_timeout_ms;
    return c;
}
