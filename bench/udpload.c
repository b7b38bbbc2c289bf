/* UDP datagrams at a fixed rate, counted by number at the other end; bounded in time.
 *
 *     udpload receive ADDRESS PORT RUN MOST_SECONDS       "ready", then one line of JSON
 *     udpload send ADDRESS PORT RUN SIZE RATE SECONDS     one line of JSON
 *
 * The sender wakes every 200 us and sends with sendmmsg what has become due, so that the rate is
 * even at a scale below any queue. One that the scheduler kept waiting catches up at twice the
 * rate, not in one burst, which would measure the queue in front of the tunnel. A datagram is a
 * magic number, the run's number, a sequence number, and padding. The last ones, of another magic
 * number, end the receiver.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <linux/sock_diag.h>
#include <netdb.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define BATCH 64
#define SLOT_NS 200000
#define LARGEST 2048
#define NUMBERS (1u << 27)      /* of packets in a run that can be told apart: 16 MiB of bits */
#define SOCKET_BUFFER (8 << 20) /* octets: a stall of 50 ms at 100,000 packets a second */
#define DATA 0x6d74646cu
#define END 0x6d74656eu
#define SECOND 1000000000ll

struct header {
    uint32_t magic;
    uint32_t run;
    uint32_t number;
};

static int64_t now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * SECOND + time.tv_nsec;
}

static void die(const char *what)
{
    fprintf(stderr, "udpload: %s: %s\n", what, errno ? strerror(errno) : "failed");
    exit(2);
}

static int open_socket(const char *address, const char *port, int receiving)
{
    struct addrinfo hints = {.ai_socktype = SOCK_DGRAM, .ai_flags = AI_NUMERICHOST | AI_NUMERICSERV};
    struct addrinfo *found;
    int size = SOCKET_BUFFER;
    int opened;

    errno = 0;
    if (getaddrinfo(address, port, &hints, &found))
        die(address);
    opened = socket(found->ai_family, SOCK_DGRAM, 0);
    if (opened < 0)
        die("socket");
    setsockopt(opened, SOL_SOCKET, receiving ? SO_RCVBUFFORCE : SO_SNDBUFFORCE, &size, sizeof size);
    if (receiving ? bind(opened, found->ai_addr, found->ai_addrlen)
                  : connect(opened, found->ai_addr, found->ai_addrlen))
        die(address);
    freeaddrinfo(found);
    return opened;
}

static int receive(char **arguments)
{
    static char buffers[BATCH][LARGEST];
    static struct mmsghdr messages[BATCH];
    static struct iovec parts[BATCH];
    const uint32_t run = (uint32_t)strtoul(arguments[2], NULL, 10);
    const int64_t end = now() + (int64_t)(atof(arguments[3]) * SECOND);
    uint64_t received = 0, duplicates = 0, reordered = 0;
    uint32_t highest = 0, memory[SK_MEMINFO_VARS] = {0};
    socklen_t length = sizeof memory;
    int done = 0;
    int input = open_socket(arguments[0], arguments[1], 1);
    uint8_t *seen = calloc(NUMBERS / 8, 1);

    if (!seen)
        die("memory");
    for (int i = 0; i < BATCH; i++) {
        parts[i] = (struct iovec){buffers[i], LARGEST};
        messages[i].msg_hdr.msg_iov = &parts[i];
        messages[i].msg_hdr.msg_iovlen = 1;
    }
    puts("ready");
    fflush(stdout);
    while (!done && now() < end) {
        struct pollfd waiting = {input, POLLIN, 0};
        int count;

        if (poll(&waiting, 1, 50) <= 0)
            continue;
        count = recvmmsg(input, messages, BATCH, MSG_DONTWAIT, NULL);
        for (int i = 0; i < count; i++) {
            struct header header;

            if (messages[i].msg_len < sizeof header)
                continue;
            memcpy(&header, buffers[i], sizeof header);
            if (header.run != run) /* a late one of the run before */
                continue;
            if (header.magic == END)
                done = 1;
            if (header.magic != DATA || header.number >= NUMBERS)
                continue;
            if (seen[header.number / 8] & (1 << header.number % 8)) {
                duplicates++;
                continue;
            }
            seen[header.number / 8] |= 1 << header.number % 8;
            received++;
            if (header.number < highest)
                reordered++;
            else
                highest = header.number;
        }
    }
    getsockopt(input, SOL_SOCKET, SO_MEMINFO, memory, &length);
    printf("{\"received\": %llu, \"duplicates\": %llu, \"reordered\": %llu, \"dropped\": %u}\n",
           (unsigned long long)received, (unsigned long long)duplicates,
           (unsigned long long)reordered, memory[SK_MEMINFO_DROPS]);
    return 0;
}

static int transmit(char **arguments)
{
    static char buffers[BATCH][LARGEST];
    static struct mmsghdr messages[BATCH];
    static struct iovec parts[BATCH];
    const size_t size = strtoul(arguments[3], NULL, 10);
    const double rate = atof(arguments[4]);
    const int64_t length = (int64_t)(atof(arguments[5]) * SECOND);
    const int64_t most = BATCH + (int64_t)(2 * rate * SLOT_NS / SECOND); /* in one slot */
    struct header header = {DATA, (uint32_t)strtoul(arguments[2], NULL, 10), 0};
    uint64_t total = (uint64_t)(rate * length / SECOND), sent = 0, refused = 0;
    int64_t begin, slot, passed;
    int output;

    errno = 0;
    if (size < sizeof header || size > LARGEST || rate <= 0 || length <= 0 || total >= NUMBERS)
        die("arguments");
    output = open_socket(arguments[0], arguments[1], 0);
    prctl(PR_SET_TIMERSLACK, 1ul, 0ul, 0ul, 0ul);
    for (int i = 0; i < BATCH; i++) {
        parts[i] = (struct iovec){buffers[i], size};
        messages[i].msg_hdr.msg_iov = &parts[i];
        messages[i].msg_hdr.msg_iovlen = 1;
    }
    begin = slot = now();
    while ((passed = now() - begin) < length && sent + refused < total) {
        uint64_t due = (uint64_t)((double)(passed + SLOT_NS) * rate / SECOND);
        struct timespec next;
        int64_t left;

        if (due > total)
            due = total;
        left = (int64_t)(due - sent - refused);
        if (left > most)
            left = most;
        while (left > 0) {
            int count = left < BATCH ? (int)left : BATCH;
            int done;

            for (int i = 0; i < count; i++) {
                header.number = (uint32_t)(sent + i);
                memcpy(buffers[i], &header, sizeof header);
            }
            done = sendmmsg(output, messages, count, 0);
            if (done > 0) {
                sent += done;
                left -= done;
            } else {
                refused++;
                if (errno != EINTR)
                    break; /* no buffer, or nobody listens: try again in the next slot */
            }
        }
        slot += SLOT_NS;
        if (slot < now())
            slot = now() + SLOT_NS;
        next = (struct timespec){slot / SECOND, slot % SECOND};
        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &next, NULL);
    }
    passed = now() - begin;
    /* What is queued on the way gets through first, then one of these will. */
    usleep(200000);
    header.magic = END;
    memcpy(buffers[0], &header, sizeof header);
    for (int i = 0; i < 8; i++) {
        if (send(output, buffers[0], size, 0) < 0 && errno != ENOBUFS && errno != EAGAIN)
            break;
        usleep(20000);
    }
    printf("{\"sent\": %llu, \"refused\": %llu, \"seconds\": %.6f}\n", (unsigned long long)sent,
           (unsigned long long)refused, (double)passed / SECOND);
    return 0;
}

int main(int count, char **arguments)
{
    if (count == 6 && !strcmp(arguments[1], "receive"))
        return receive(arguments + 2);
    if (count == 8 && !strcmp(arguments[1], "send"))
        return transmit(arguments + 2);
    fprintf(stderr, "usage: udpload receive ADDRESS PORT RUN MOST_SECONDS\n"
                    "       udpload send ADDRESS PORT RUN SIZE RATE SECONDS\n");
    return 2;
}
