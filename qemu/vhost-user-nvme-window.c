/*
 * The doorbell window of the device vhost-user-nvme: the daemon's file, as this process and as the guest see it.
 *
 * Copyright (c) 2026 the vhost-user-nvme authors
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "qemu/osdep.h"

#include <sys/mman.h>

#include "hw/core/cpu.h"
#include "qemu/error-report.h"
#include "system/kvm.h"
#include "system/tcg.h"
#include "vhost-user-nvme.h"

/* Shared memory regions of the back-end. */
#define SHM_FRONTEND 0  /* the doorbell window as this process sees it */
#define SHM_GUEST 1     /* the same, as the guest sees it */

/* ------------------------------------------------------------------ life */

static void window_forget_file(NvmeWindow *w)
{
    if (w->fd >= 0) {
        close(w->fd);
        w->fd = -1;
    }
}

static void window_unmap(NvmeWindow *w)
{
    munmap(w->start, w->size);
    g_free(w);
}

void nvme_window_free(NvmeWindow *w)
{
    if (!w) {
        return;
    }
    window_forget_file(w);
    if (w->start) {
        call_rcu(w, window_unmap, rcu);
    } else {
        g_free(w);
    }
}

/* Puts nobody's memory where the daemon's file was: late accesses end there. */
bool nvme_window_reserve(VhostUserNvme *n)
{
    NvmeWindow *w = n->window;
    void *p = mmap(w->start, w->size, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | (w->start ? MAP_FIXED : 0), -1, 0);

    if (p == MAP_FAILED) {
        return false;
    }
    w->start = p;
    window_forget_file(w);
    return true;
}

void nvme_window_abandon(VhostUserNvme *n)
{
    if (!nvme_window_reserve(n)) {
        warn_report("%s: cannot let go of the doorbell window: %s", n->name, strerror(errno));
    }
}

/* ------------------------------------------------------------------ what the daemon asks for */

static bool window_range_ok(VhostUserNvme *n, const VuMapping *m)
{
    return m->shm_offset == 0 && m->len == n->window->size;
}

/* True if the descriptor is a file that holds the range; one that does not would kill this process with SIGBUS. */
static bool file_holds(int fd, uint64_t offset, uint64_t len)
{
    struct stat st;

    return fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && offset <= INT64_MAX && len <= INT64_MAX - offset &&
           offset + len <= (uint64_t)st.st_size;
}

static size_t side_size(VhostUserNvme *n)
{
    return ROUND_UP(n->n_vrings * sizeof(NvmeSideWords), qemu_real_host_page_size());
}

/* Optional: without them every ring kicks, and every interrupt comes through its eventfd. */
static void side_map(VhostUserNvme *n, const VuMapping *m, int fd)
{
    uint64_t offset = m->fd_offset + n->shape.side_offset;
    unsigned i;
    void *p;

    if (!n->shape.side_offset || !n->watch_us || kvm_msi_via_irqfd_enabled() ||
        !file_holds(fd, offset, side_size(n))) {
        return;
    }
    p = mmap(NULL, side_size(n), PROT_READ | PROT_WRITE, MAP_SHARED, fd, offset);
    if (p == MAP_FAILED) {
        return;
    }
    n->side = p;
    for (i = 0; i < n->n_vrings; i++) {
        /* The daemon has set all words to zero: nothing it counts from now on has been injected. */
        n->vrings[i].seen = 0;
        n->vrings[i].missed = n->vrings[i].pass_over = 0;
        qatomic_set(&n->side[i].attentive, cpu_to_le32(1));
    }
}

void nvme_side_unmap(VhostUserNvme *n)
{
    if (n->side) {
        munmap(n->side, side_size(n));
        n->side = NULL;
    }
}

void nvme_window_show(VhostUserNvme *n, bool on)
{
    if (n->doorbells.enabled != on) {
        memory_region_set_enabled(&n->doorbells, on);
    }
}

VuAnswer nvme_window_map(void *opaque, const VuMapping *m, int fd)
{
    VhostUserNvme *n = opaque;
    int copy;

    if (!window_range_ok(n, m) || !m->writable || (m->shmid == SHM_GUEST) != n->window_mapped) {
        return VU_ANSWER_FAILED;
    }
    switch (m->shmid) {
    case SHM_FRONTEND:
        if (!file_holds(fd, m->fd_offset, m->len)) {
            return VU_ANSWER_FAILED;
        }
        copy = qemu_dup(fd);
        if (copy < 0) {
            return VU_ANSWER_FAILED;
        }
        /* Of a daemon that comes back it is the file that is there: no store of the guest falls between the two. */
        if (mmap(n->window->start, n->window->size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd,
                 m->fd_offset) == MAP_FAILED) {
            close(copy);
            return VU_ANSWER_FAILED;
        }
        window_forget_file(n->window);
        n->window->fd = copy;
        n->window->fd_offset = m->fd_offset;
        side_map(n, m, fd);
        n->window_mapped = true;
        return VU_ANSWER_OK;
    case SHM_GUEST:
        /* The same file by contract, so it is there already and needs to be shown only. */
        nvme_window_show(n, true);
        return VU_ANSWER_OK;
    default:
        return VU_ANSWER_FAILED;
    }
}

/* ------------------------------------------------------------------ taking it back */

static void fence_drop(NvmeFence *f)
{
    VhostUserNvme *n = f->n;

    if (--f->left) {
        return;
    }
    if (n->fence == f) {
        n->fence = NULL;
        if (vu_client_alive(n->client)) {
            vu_client_answer(n->client, true);
        } else {
            nvme_link_trapped(n);
        }
    }
    g_free(f);
    object_unref(OBJECT(n));
}

static void fence_on_cpu(CPUState *cpu, run_on_cpu_data data)
{
    fence_drop(data.host_ptr);
}

/*
 * True if no virtual CPU reaches the window as memory any more; else n->fence waits for it.
 *
 * KVM takes the memory slot away before it returns. TCG has queued a flush of the translations on every CPU; what is
 * queued after it runs after it, between two blocks of guest code. Nothing waits here, so no CPU can hold it up but by not
 * running, and then it stores nothing.
 */
static bool window_hide(VhostUserNvme *n)
{
    NvmeFence *f;
    CPUState *cpu;

    nvme_window_show(n, false);
    n->fence = NULL;
    if (!tcg_enabled()) {
        return true;
    }
    f = g_new0(NvmeFence, 1);
    f->n = n;
    object_ref(OBJECT(n));
    f->left = 1;
    n->fence = f;
    CPU_FOREACH(cpu) {
        f->left++;
        async_run_on_cpu(cpu, fence_on_cpu, RUN_ON_CPU_HOST_PTR(f));
    }
    f->left--;
    if (f->left) {
        return false;
    }
    n->fence = NULL;
    g_free(f);
    object_unref(OBJECT(n));
    return true;
}

VuAnswer nvme_window_unmap(void *opaque, const VuMapping *m)
{
    VhostUserNvme *n = opaque;

    if (m->shmid != SHM_GUEST || !window_range_ok(n, m)) {
        return VU_ANSWER_FAILED;
    }
    return window_hide(n) ? VU_ANSWER_OK : VU_ANSWER_LATER;
}

bool nvme_window_take_back(VhostUserNvme *n)
{
    nvme_side_unmap(n);
    /* A file that somebody cut would be this process's end. */
    if (n->window->fd >= 0 && !file_holds(n->window->fd, n->window->fd_offset, n->window->size)) {
        nvme_window_abandon(n);
    }
    return window_hide(n);
}
