/*
 * The registers of the device vhost-user-nvme: the daemon's while it is there; what they were last, and what is to be
 * written, while it is not.
 *
 * Copyright (c) 2026 the vhost-user-nvme authors
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "qemu/osdep.h"

#include "qemu/bswap.h"
#include "qemu/error-report.h"
#include "vhost-user-nvme.h"

#define REG_VS 0x08
#define REG_INTMS 0x0c
#define REG_INTMC 0x10
#define REG_CC 0x14
#define REG_AQA 0x24
#define REG_END 0x38    /* of what the guest writes: CC, AQA, ASQ, ACQ */

#define VERSION_2_0 0x00020000u

static uint64_t all_ones(unsigned size)
{
    return size < 8 ? (1ull << (size * 8)) - 1 : UINT64_MAX;
}

/* ------------------------------------------------------------------ what is known */

static void note(VhostUserNvme *n, uint32_t addr, const void *bytes, unsigned size)
{
    if (addr < NVME_REGS_KNOWN) {
        memcpy(n->known + addr, bytes, MIN(size, NVME_REGS_KNOWN - addr));
    }
}

static uint64_t last_known(VhostUserNvme *n, uint32_t addr, unsigned size)
{
    uint8_t bytes[8] = { 0 };

    if (addr < NVME_REGS_KNOWN) {
        memcpy(bytes, n->known + addr, MIN(size, NVME_REGS_KNOWN - addr));
    }
    return ldn_le_p(bytes, size);
}

/* Registers that read as what was written. */
static void note_written(VhostUserNvme *n, uint32_t addr, uint64_t value, unsigned size)
{
    uint8_t bytes[8];
    uint32_t mask;

    if (size == 4 && (addr == REG_INTMS || addr == REG_INTMC)) {
        mask = ldl_le_p(n->known + REG_INTMS);
        mask = addr == REG_INTMS ? mask | value : mask & ~value;
        stl_le_p(n->known + REG_INTMS, mask);
        stl_le_p(n->known + REG_INTMC, mask);
    } else if (size >= 4 && (addr == REG_CC || (addr >= REG_AQA && addr < REG_END))) {
        stn_le_p(bytes, size, value);
        /* CSTS, behind CC, is not the guest's to write. */
        note(n, addr, bytes, addr == REG_CC ? 4 : size);
    }
}

void nvme_regs_reset(VhostUserNvme *n)
{
    memset(n->known + REG_INTMS, 0, REG_END - REG_INTMS);
    n->n_kept = 0;
    n->kept_too_many = false;
    n->used = false;
}

void nvme_regs_init(VhostUserNvme *n, uint64_t cap)
{
    memset(n->known, 0, sizeof(n->known));
    stq_le_p(n->known + NVME_REG_CAP, cap);
    stl_le_p(n->known + REG_VS, VERSION_2_0);
    nvme_regs_reset(n);
}

/* ------------------------------------------------------------------ accesses of the guest */

uint64_t nvme_regs_read(VhostUserNvme *n, uint32_t addr, unsigned size)
{
    uint8_t bytes[8];

    if (n->link == NVME_LINK_UP) {
        switch (vu_client_config_read(n->client, addr, bytes, size)) {
        case VU_OK:
            note(n, addr, bytes, size);
            return ldn_le_p(bytes, size);
        case VU_REFUSED:
            return all_ones(size);
        case VU_GONE:
            break;
        }
    }
    /* What a PCI function that was pulled out reads. */
    return n->link == NVME_LINK_LOST ? all_ones(size) : last_known(n, addr, size);
}

static VuResult send_write(VhostUserNvme *n, const NvmeWrite *w)
{
    uint8_t bytes[8];

    stn_le_p(bytes, w->size, w->value);
    /* Whatever becomes of it, the daemon may have done it. */
    n->used = true;
    return vu_client_config_write(n->client, w->addr, bytes, w->size);
}

void nvme_regs_write(VhostUserNvme *n, uint32_t addr, uint64_t value, unsigned size)
{
    NvmeWrite w = { addr, size, value };

    if (n->link == NVME_LINK_LOST) {
        return;
    }
    note_written(n, addr, value, size);
    if (n->link == NVME_LINK_UP && send_write(n, &w) != VU_GONE) {
        return;
    }
    if (n->link == NVME_LINK_LOST) {
        return;
    }
    /* The same once more says nothing new. */
    if (n->n_kept && !memcmp(&n->kept[n->n_kept - 1], &w, sizeof(w))) {
        return;
    }
    if (n->n_kept == NVME_WRITES_KEPT) {
        if (!n->kept_too_many) {
            n->kept_too_many = true;
            warn_report("%s: the guest writes to registers again and again; what is more than %d writes is ignored until "
                        "the daemon is there", n->name, NVME_WRITES_KEPT);
        }
        return;
    }
    n->kept[n->n_kept++] = w;
}

/* ------------------------------------------------------------------ the daemon is back */

VuResult nvme_regs_resume(VhostUserNvme *n)
{
    unsigned sent = 0;
    uint32_t addr;
    VuResult r = VU_OK;

    while (sent < n->n_kept && (r = send_write(n, &n->kept[sent])) != VU_GONE) {
        sent++;
    }
    n->n_kept -= sent;
    memmove(n->kept, n->kept + sent, n->n_kept * sizeof(n->kept[0]));
    if (r == VU_GONE) {
        return r;
    }
    n->kept_too_many = false;
    for (addr = 0; addr < NVME_REGS_KNOWN; addr += 8) {
        uint8_t bytes[8];

        r = vu_client_config_read(n->client, addr, bytes, sizeof(bytes));
        if (r == VU_GONE) {
            return r;
        }
        if (r == VU_OK) {
            note(n, addr, bytes, sizeof(bytes));
        }
    }
    return VU_OK;
}
