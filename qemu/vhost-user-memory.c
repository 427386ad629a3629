/*
 * Guest RAM as a vhost-user back-end sees it. See vhost-user-memory.h.
 *
 * Copyright (c) 2026 the vhost-user-nvme authors
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "qemu/osdep.h"

#include "compat.h"
#include "qapi/error.h"
#include "qemu/error-report.h"
#include "qemu/units.h"
#include "system/hostmem.h"
#include "vhost-user-memory.h"

/*
 * Firmware moves the borders of the RAM below 1 MiB at every boot. No region crosses this line, so that the big one above
 * stays what it is.
 */
#define VU_LOW_MEMORY MiB

typedef struct VuRegion {
    MemoryRegion *mr;   /* referenced */
    uint64_t gpa;
    uint64_t size;
    uint64_t start;     /* in the memory region */
} VuRegion;

struct VuMemory {
    MemoryListener listener;
    VuClient *client;
    char *name;
    uint64_t slots;
    GArray *now;        /* VuRegion: what the back-end has */
    GArray *next;       /* VuRegion: what this transaction finds */
    GHashTable *warned; /* names of blocks */
    Error **errp;       /* the first transaction's problems are errors */
    bool failed;        /* and there was one */
};

static const char *region_name(MemoryRegion *mr)
{
    return memory_region_name(mr);
}

static void G_GNUC_PRINTF(3, 4) problem(VuMemory *m, MemoryRegion *mr, const char *fmt, ...)
{
    g_autofree char *text = NULL;
    va_list ap;

    va_start(ap, fmt);
    text = g_strdup_vprintf(fmt, ap);
    va_end(ap);
    if (m->errp) {
        if (!m->failed) {
            error_setg(m->errp, "memory '%s' %s", region_name(mr), text);
            error_append_hint(m->errp, "Guest memory must be shared with the daemon, for example: "
                              "-object memory-backend-memfd,id=mem,size=2G,share=on -machine memory-backend=mem\n");
        }
        m->failed = true;
    } else if (g_hash_table_add(m->warned, g_strdup(region_name(mr)))) {
        warn_report("%s: memory '%s' %s; I/O to it will fail", m->name, region_name(mr), text);
    }
}

static void drop_regions(GArray *a)
{
    guint i;

    for (i = 0; i < a->len; i++) {
        memory_region_unref(g_array_index(a, VuRegion, i).mr);
    }
    g_array_set_size(a, 0);
}

/* ------------------------------------------------------------------ what there is */

static void vu_memory_begin(MemoryListener *listener)
{
    VuMemory *m = container_of(listener, VuMemory, listener);

    drop_regions(m->next);
}

/* Adds a piece, merged with the one before it if it goes on where that ends (or, rounded to huge pages, before). */
static void add_piece(VuMemory *m, MemoryRegion *mr, uint64_t gpa, uint64_t size, uint64_t start)
{
    VuRegion r = { mr, gpa, size, start };

    if (m->next->len) {
        VuRegion *last = &g_array_index(m->next, VuRegion, m->next->len - 1);

        if (last->mr == mr && gpa <= last->gpa + last->size && gpa - start == last->gpa - last->start &&
            gpa != VU_LOW_MEMORY) {
            last->size = MAX(last->size, gpa + size - last->gpa);
            return;
        }
        if (gpa < last->gpa + last->size) {
            problem(m, mr, "shares a huge page of guest addresses with '%s'", region_name(last->mr));
            return;
        }
    }
    memory_region_ref(mr);
    g_array_append_val(m->next, r);
}

/* Called for every piece of the flat memory map, in ascending order. */
static void vu_memory_section(MemoryListener *listener, MemoryRegionSection *section)
{
    VuMemory *m = container_of(listener, VuMemory, listener);
    MemoryRegion *mr = section->mr;
    uint64_t gpa = section->offset_within_address_space;
    uint64_t size = int128_get64(section->size);
    uint64_t start = section->offset_within_region;
    uint64_t page, down, up;

    if (!memory_region_is_ram(mr) || memory_region_is_rom(mr) || memory_region_is_ram_device(mr) ||
        section->readonly) {
        return;
    }
    if (memory_region_get_fd(mr) < 0 || !qemu_ram_is_shared(mr->ram_block)) {
        /* Video memory, firmware and the like are nobody's DMA target. */
        if (object_dynamic_cast(memory_region_owner(mr), TYPE_MEMORY_BACKEND)) {
            problem(m, mr, memory_region_get_fd(mr) < 0 ? "is not in a file (memfd, hugetlbfs) that can be shared" :
                                                          "is private: it needs share=on");
        }
        return;
    }
    /* A huge page can be mapped as a whole only. */
    page = qemu_ram_pagesize(mr->ram_block);
    down = MIN(start & (page - 1), gpa);
    up = ROUND_UP(start + size, page) - (start + size);
    gpa -= down;
    start -= down;
    size += down + up;
    if (page < VU_LOW_MEMORY && gpa < VU_LOW_MEMORY && gpa + size > VU_LOW_MEMORY) {
        uint64_t low = VU_LOW_MEMORY - gpa;

        add_piece(m, mr, gpa, low, start);
        add_piece(m, mr, VU_LOW_MEMORY, size - low, start + low);
    } else {
        add_piece(m, mr, gpa, size, start);
    }
}

/* ------------------------------------------------------------------ what changed */

static bool same_region(const VuRegion *a, const VuRegion *b)
{
    return a->mr == b->mr && a->gpa == b->gpa && a->size == b->size && a->start == b->start;
}

static bool holds(GArray *a, const VuRegion *r)
{
    guint i;

    for (i = 0; i < a->len; i++) {
        if (same_region(&g_array_index(a, VuRegion, i), r)) {
            return true;
        }
    }
    return false;
}

static uint64_t region_uaddr(const VuRegion *r)
{
    return (uintptr_t)memory_region_get_ram_ptr(r->mr) + r->start;
}

static uint64_t region_offset(const VuRegion *r)
{
    return r->mr->ram_block->fd_offset + r->start;
}

static void send_removals(VuMemory *m)
{
    guint i = 0;

    while (i < m->now->len) {
        VuRegion *r = &g_array_index(m->now, VuRegion, i);

        if (holds(m->next, r)) {
            i++;
            continue;
        }
        if (m->client &&
            vu_client_mem_remove(m->client, r->gpa, r->size, region_uaddr(r), region_offset(r)) == VU_REFUSED) {
            warn_report("%s: the daemon refused to give back memory '%s' at 0x%" PRIx64, m->name,
                        region_name(r->mr), r->gpa);
        }
        memory_region_unref(r->mr);
        g_array_remove_index(m->now, i);
    }
}

static void send_additions(VuMemory *m)
{
    guint i;

    for (i = 0; i < m->next->len; i++) {
        VuRegion *r = &g_array_index(m->next, VuRegion, i);

        if (holds(m->now, r)) {
            continue;
        }
        if (m->client && m->now->len >= m->slots) {
            problem(m, r->mr, "at 0x%" PRIx64 " does not fit: the daemon takes %" PRIu64 " regions", r->gpa, m->slots);
            continue;
        }
        if (m->client && vu_client_mem_add(m->client, r->gpa, r->size, region_uaddr(r), region_offset(r),
                                           memory_region_get_fd(r->mr)) == VU_REFUSED) {
            problem(m, r->mr, "at 0x%" PRIx64 " was refused by the daemon", r->gpa);
            continue;
        }
        memory_region_ref(r->mr);
        g_array_append_val(m->now, *r);
    }
}

static void vu_memory_commit(MemoryListener *listener)
{
    VuMemory *m = container_of(listener, VuMemory, listener);

    send_removals(m);
    send_additions(m);
    drop_regions(m->next);
}

/* ------------------------------------------------------------------ life */

VuMemory *vu_memory_new(VuClient *client, const char *name, Error **errp)
{
    ERRP_GUARD();
    VuMemory *m;
    uint64_t slots = UINT64_MAX;

    if (client && vu_client_mem_slots(client, &slots) != VU_OK) {
        error_propagate(errp, vu_client_take_error(client));
        return NULL;
    }
    m = g_new0(VuMemory, 1);
    m->client = client;
    m->name = g_strdup(name);
    m->slots = slots;
    m->now = g_array_new(false, false, sizeof(VuRegion));
    m->next = g_array_new(false, false, sizeof(VuRegion));
    m->warned = g_hash_table_new_full(g_str_hash, g_str_equal, g_free, NULL);
    m->listener = (MemoryListener) {
        .name = "vhost-user-nvme",
        .begin = vu_memory_begin,
        .region_add = vu_memory_section,
        .region_nop = vu_memory_section,
        .commit = vu_memory_commit,
        .priority = MEMORY_LISTENER_PRIORITY_DEV_BACKEND,
    };
    m->errp = errp;
    memory_listener_register(&m->listener, &address_space_memory);
    m->errp = NULL;
    if (!m->failed && client && !vu_client_alive(client)) {
        error_propagate(errp, vu_client_take_error(client));
        m->failed = true;
    }
    if (m->failed) {
        vu_memory_free(m);
        return NULL;
    }
    return m;
}

void vu_memory_detach(VuMemory *m)
{
    m->client = NULL;
}

void vu_memory_free(VuMemory *m)
{
    if (!m) {
        return;
    }
    /* The connection ends with the device, and takes the regions with it: nothing to send. */
    m->client = NULL;
    memory_listener_unregister(&m->listener);
    drop_regions(m->next);
    drop_regions(m->now);
    g_array_free(m->next, true);
    g_array_free(m->now, true);
    g_hash_table_destroy(m->warned);
    g_free(m->name);
    g_free(m);
}
