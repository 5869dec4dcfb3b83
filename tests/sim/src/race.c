// Vector clocks. Every piece of queued work has a ticket of its stream; a clock holds, per stream, the last ticket
// that is known to have happened. Two accesses conflict if one of them writes and neither is in the other's past:
// that is a race, even where the timing of this run made it come out right.
//
// The host is one clock: threads that share a buffer are taken to agree among themselves.
#include "sim.h"

vclock_t host_clock;

void join_clock(vclock_t *into, const vclock_t *from) {
    for (int i = 0; i < stream_ids; i++)
        if (from->ticket[i] > into->ticket[i]) into->ticket[i] = from->ticket[i];
}

// Forget accesses that everything to come is ordered after.
static int forget_past(allocation_t *allocation) {
    int forgotten = 0;
    for (access_t **link = &allocation->accesses; *link;) {
        access_t *access = *link;
        if (host_clock.ticket[access->stream] < access->ticket) {
            link = &access->next;
            continue;
        }
        *link = access->next;
        free(access);
        forgotten = 1;
    }
    return forgotten;
}

void host_waited_for(const vclock_t *clock) {
    join_clock(&host_clock, clock);
    for (allocation_t *a = allocations; a; a = a->next)
        if (a->live && a->accesses && forget_past(a)) reguard(a);
}

static void report_race(const allocation_t *a, const access_t *old, const access_t *new) {
    counts.races++;
    report("race on %s memory %p, bytes %zu to %zu: %s (%s, stream %d) is not ordered after %s (%s, stream %d)",
           a->kind == DEVICE ? "device" : "pinned", (void *)a->base, new->low, new->high, new->what,
           new->writes ? "write" : "read", new->stream, old->what, old->writes ? "write" : "read", old->stream);
}

void note_access(stream_t *stream, uint32_t ticket, const void *pointer, size_t size, int writes, const char *what) {
    allocation_t *a = allocation_at(pointer, size);
    if (!a || !settings.race) return;
    size_t low = (const char *)pointer - a->base;
    access_t *access = malloc(sizeof *access);
    *access = (access_t){a->accesses, stream->id, ticket, low, low + size, writes, what};
    for (access_t *old = a->accesses; old; old = old->next) {
        int conflict = (old->writes || writes) && low < old->high && old->low < access->high;
        if (conflict && stream->clock.ticket[old->stream] < old->ticket) report_race(a, old, access);
    }
    a->accesses = access;
    reguard(a);
}
