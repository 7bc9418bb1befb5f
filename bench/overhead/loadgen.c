/* Closed-loop HTTP/1.1 load generator: one process, one epoll loop, and an exact account of what came back.
 *
 *   loadgen key=value ...
 *     ports=P,P..          connection i goes to port i mod their number (several: straight to the endpoints)
 *     connections=N        each sends its next request when the last one is answered
 *     groups=N prefix=B own=B   a prompt is the prefix of one of N groups (B bytes) and B bytes of its own
 *     max_tokens=N stream=0|1 pace_us=N   as in mock.c
 *     seed=N               of the prompts: equal seeds make equal requests, in the same order
 *     think_us=N           pause between an answer and the next request
 *     stagger_us=N         connection i starts i*N after the first
 *     warmup_s=F duration_s=F
 *
 * At the bounds of the measured window it prints "begin" and "end" and waits for a line on stdin, so that whoever reads
 * CPU clocks reads them at the same instants. After "end" nothing new is sent; what is under way gets DRAIN_US to
 * finish. Then one line of JSON: counts over the window, `issued`, `answered` and `unfinished` over the whole run.
 */
#define _GNU_SOURCE
#include "wire.h"
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define DRAIN_US 1000000
#define MAX_PORTS 256
#define MAX_HEAD 8192
#define POOL_BYTES (1 << 20)
#define MAX_SAMPLES (1 << 22)

enum { IDLE, HEAD, BODY };                                           /* of a connection */
enum { CHUNK_SIZE, CHUNK_DATA, CHUNK_CRLF, TRAILER, CHUNKS_DONE };    /* of a chunked body */

typedef struct {
  int fd, port, state;
  char *request;
  size_t request_size, sent;
  uint64_t start_at_us, sent_at_us;
  /* the answer so far */
  char head[MAX_HEAD + 1], line[64]; /* line: a chunk's size line, or the end of a trailer line */
  size_t head_size, line_size;
  int status, chunked, chunk_state, keep_alive, saw_done;
  size_t left; /* of the body, or of the chunk */
  size_t body_bytes;
  long events;
  char event[1024]; /* an event cut by the end of a read */
  size_t event_size;
} Connection;

static struct {
  int ports[MAX_PORTS], port_count;
  long connections, groups, prefix, own, max_tokens, stream, pace_us, think_us, stagger_us, seed;
  double warmup_s, duration_s;
} options = {.connections = 1, .groups = 1, .max_tokens = 16, .warmup_s = 0.5, .duration_s = 2};

typedef struct {
  uint32_t *values;
  size_t count;
} Samples;

static struct {
  uint64_t done, events, reads, answer_bytes;                    /* in the window */
  uint64_t issued, answered, reconnects;                         /* in the whole run */
  uint64_t bad_status, incomplete, altered, closed;              /* errors in the whole run */
  Samples latency_us, first_byte_us, event_delay_us;
} total;

static int epoll_fd, measuring, draining;
static long unstarted; /* connections that wait for their time */
static char *pool, *prefixes, tail[128];
static size_t expected_answer, expected_event;
static char read_buffer[262144];

/* ---- requests ---- */

static uint64_t random_state = 88172645463325252ULL;

static uint64_t next_random(void) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}

/* Words, with an escaped line break about every 80 characters, as prompts have them. A '\' never ends the text. */
static void write_words(char *out, size_t size) {
  size_t at = 0, line = 0;
  while (at < size) {
    for (size_t letters = 2 + next_random() % 8; letters && at < size; letters--, line++) out[at++] = 'a' + next_random() % 26;
    if (line > 80 && at + 2 < size) {
      out[at++] = '\\';
      out[at++] = 'n';
      line = 0;
    } else if (at < size) {
      out[at++] = ' ';
      line++;
    }
  }
}

/* A piece of the pool that does not cut an escape in two. */
static const char *own_text(void) {
  char *at = pool + next_random() % (POOL_BYTES - options.own - 2);
  while (at[-1] == '\\' || at[options.own - 1] == '\\') at++;
  return at;
}

static void prepare_prompts(void) {
  random_state ^= options.seed * 0x9E3779B97F4A7C15ULL;
  pool = malloc(POOL_BYTES + 64);
  write_words(pool, POOL_BYTES + 64);
  pool++; /* own_text looks one back */
  prefixes = malloc(options.groups * options.prefix + 1);
  for (long g = 0; g < options.groups; g++) write_words(prefixes + g * options.prefix, options.prefix);
  int n = snprintf(tail, sizeof tail, "\"}],\"max_tokens\":%ld,\"stream\":%s", options.max_tokens, options.stream ? "true" : "false");
  if (options.pace_us) n += snprintf(tail + n, sizeof tail - n, ",\"pace_us\":%ld", options.pace_us);
  snprintf(tail + n, sizeof tail - n, "}");
  expected_answer = snprintf(NULL, 0, ANSWER_FORMAT, 0L, 0L);
  expected_event = snprintf(NULL, 0, EVENT_FORMAT, STAMP_DIGITS, 0ULL);
}

#define SYSTEM "{\"model\":\"" MODEL "\",\"messages\":[{\"role\":\"system\",\"content\":\""
#define USER "\"},{\"role\":\"user\",\"content\":\""

static size_t most_request_bytes(void) { return 1024 + sizeof SYSTEM + options.prefix + sizeof USER + options.own + sizeof tail; }

static void build_request(Connection *c) {
  size_t body = strlen(SYSTEM) + options.prefix + strlen(USER) + options.own + strlen(tail);
  char *at = c->request;
  at += sprintf(at,
                "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Type: application/json\r\n"
                "Authorization: Bearer sk-0123456789abcdef\r\nUser-Agent: loadgen\r\nAccept: */*\r\nContent-Length: %zu\r\n\r\n",
                c->port, body);
  at = stpcpy(at, SYSTEM);
  at = mempcpy(at, prefixes + next_random() % options.groups * options.prefix, options.prefix);
  at = stpcpy(at, USER);
  at = mempcpy(at, own_text(), options.own);
  at = stpcpy(at, tail);
  c->request_size = at - c->request;
}

/* ---- connections ---- */

static void watch(Connection *c, int operation, int also_writable) {
  struct epoll_event e = {.events = EPOLLIN | (also_writable ? EPOLLOUT : 0), .data.ptr = c};
  epoll_ctl(epoll_fd, operation, c->fd, &e);
}

static void open_connection(Connection *c) {
  struct sockaddr_in address = {
      .sin_family = AF_INET, .sin_port = htons(c->port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  int on = 1;
  c->fd = socket(AF_INET, SOCK_STREAM, 0);
  if (connect(c->fd, (void *)&address, sizeof address)) {
    perror("connect");
    exit(2);
  }
  setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  watch(c, EPOLL_CTL_ADD, 0);
}

static void wait_until(Connection *c, uint64_t at_us) {
  c->state = IDLE;
  c->start_at_us = at_us;
  unstarted++;
}

static void reopen(Connection *c) {
  close(c->fd);
  open_connection(c);
  total.reconnects++;
}

static void on_lost(Connection *c) {
  if (c->state != IDLE) {
    total.closed++;
    wait_until(c, now_us() + 10000);
  }
  reopen(c);
}

static void continue_sending(Connection *c) {
  while (c->sent < c->request_size) {
    ssize_t n = send(c->fd, c->request + c->sent, c->request_size - c->sent, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n < 0) { /* full: go on when it is writable; broken: the read will say so */
      if (errno == EAGAIN) watch(c, EPOLL_CTL_MOD, 1);
      return;
    }
    c->sent += n;
  }
}

static void start_request(Connection *c) {
  build_request(c);
  c->sent = 0;
  c->state = HEAD;
  c->head_size = c->line_size = c->event_size = c->body_bytes = 0;
  c->chunk_state = CHUNK_SIZE;
  c->saw_done = c->events = 0;
  c->sent_at_us = now_us();
  total.issued++;
  continue_sending(c);
}

static void record(Samples *s, uint64_t value) {
  if (s->count < MAX_SAMPLES) s->values[s->count++] = value;
}

static void finish(Connection *c) {
  uint64_t now = now_us();
  int whole = options.stream ? c->saw_done && c->events == options.max_tokens : c->body_bytes > 0;
  size_t expected = options.stream ? options.max_tokens * expected_event + strlen(EVENT_DONE) : expected_answer;
  total.answered++;
  if (c->status != 200) total.bad_status++;
  else if (!whole) total.incomplete++;
  else if (c->body_bytes != expected) total.altered++;
  if (measuring) {
    total.done++;
    record(&total.latency_us, now - c->sent_at_us);
  }
  c->state = IDLE;
  if (!c->keep_alive) reopen(c);
  if (draining) return;
  if (options.think_us) wait_until(c, now + options.think_us);
  else start_request(c);
}

/* ---- answers ---- */

static void on_event(Connection *c, const char *event, size_t size, uint64_t now) {
  if (size >= strlen(EVENT_DONE) - 2 && !memcmp(event, EVENT_DONE, strlen(EVENT_DONE) - 2)) {
    c->saw_done = 1;
    return;
  }
  const char *stamp = memmem(event, size, STAMP_KEY, strlen(STAMP_KEY));
  if (!stamp) return; /* a router's own event or comment: it changes body_bytes, and counts as altered */
  c->events++;
  if (!measuring) return;
  uint64_t sent_us = strtoull(stamp + strlen(STAMP_KEY), NULL, 10);
  total.events++;
  record(&total.event_delay_us, now > sent_us ? now - sent_us : 0);
}

/* Body bytes without chunk framing. */
static void on_body(Connection *c, const char *data, size_t size, uint64_t now) {
  c->body_bytes += size;
  if (measuring) total.answer_bytes += size;
  if (!options.stream) return;
  while (size) {
    const char *end = NULL;
    if (c->event_size) { /* finish the event that was cut: its end may itself be cut */
      size_t room = sizeof c->event - c->event_size, take = size < room ? size : room, from = c->event_size;
      memcpy(c->event + from, data, take);
      end = memmem(c->event + from - 1, take + 1, "\n\n", 2);
      size_t used = end ? (size_t)(end + 2 - c->event) - from : take;
      c->event_size += used;
      data += used;
      size -= used;
      if (end) {
        on_event(c, c->event, c->event_size - 2, now);
        c->event_size = 0;
      } else if (c->event_size == sizeof c->event) c->event_size = 1; /* not an event of ours: altered */
      continue;
    }
    end = memmem(data, size, "\n\n", 2);
    if (!end) {
      c->event_size = size < sizeof c->event ? size : 1;
      memcpy(c->event, data, c->event_size);
      return;
    }
    on_event(c, data, end - data, now);
    size -= end + 2 - data;
    data = end + 2;
  }
}

/* Returns 1 when the chunked body is complete. */
static int on_chunked(Connection *c, const char *data, size_t size, uint64_t now) {
  while (size && c->chunk_state != CHUNKS_DONE) {
    if (c->chunk_state == CHUNK_DATA) {
      size_t take = size < c->left ? size : c->left;
      on_body(c, data, take, now);
      data += take;
      size -= take;
      c->left -= take;
      if (!c->left) c->chunk_state = CHUNK_CRLF;
      continue;
    }
    char byte = *data++;
    size--;
    if (byte != '\n') {
      if (byte != '\r' && c->line_size < sizeof c->line - 1) c->line[c->line_size++] = byte;
      continue;
    }
    c->line[c->line_size] = 0;
    if (c->chunk_state == CHUNK_SIZE) {
      c->left = strtoul(c->line, NULL, 16);
      c->chunk_state = c->left ? CHUNK_DATA : TRAILER;
    } else if (c->chunk_state == CHUNK_CRLF) c->chunk_state = CHUNK_SIZE;
    else if (!c->line_size) c->chunk_state = CHUNKS_DONE;
    c->line_size = 0;
  }
  return c->chunk_state == CHUNKS_DONE;
}

/* Takes what belongs to the head; returns how many bytes that was, and goes to BODY when the head is whole. */
static size_t on_head(Connection *c, const char *data, size_t size, uint64_t now) {
  size_t before = c->head_size, take = size < MAX_HEAD - before ? size : MAX_HEAD - before;
  if (!before && measuring) record(&total.first_byte_us, now - c->sent_at_us);
  memcpy(c->head + before, data, take);
  c->head_size += take;
  char *end = memmem(c->head, c->head_size, "\r\n\r\n", 4);
  if (!end) return take;
  *end = 0;
  char *length = strcasestr(c->head, "\r\ncontent-length:");
  c->status = atoi(c->head + 9);
  c->chunked = !length && strcasestr(c->head, "\r\ntransfer-encoding: chunked");
  c->left = length ? strtoul(length + 17, NULL, 10) : 0;
  c->keep_alive = !strcasestr(c->head, "\r\nconnection: close");
  c->state = BODY;
  return end + 4 - c->head - before;
}

static void on_data(Connection *c, const char *data, size_t size, uint64_t now) {
  if (c->state == HEAD) {
    size_t used = on_head(c, data, size, now);
    data += used;
    size -= used;
  }
  if (c->state != BODY) return;
  int whole;
  if (c->chunked) whole = on_chunked(c, data, size, now);
  else {
    size_t take = size < c->left ? size : c->left;
    on_body(c, data, take, now);
    c->left -= take;
    whole = !c->left;
  }
  if (whole) finish(c);
}

static void on_readable(Connection *c) {
  ssize_t n;
  do {
    n = recv(c->fd, read_buffer, sizeof read_buffer, MSG_DONTWAIT);
    if (n < 0 && errno == EAGAIN) return;
    if (n <= 0) {
      on_lost(c);
      return;
    }
    if (measuring) total.reads++;
    on_data(c, read_buffer, n, now_us());
  } while (n == sizeof read_buffer);
}

/* ---- the run ---- */

static long underway(const Connection *all) {
  long n = 0;
  for (long i = 0; i < options.connections; i++) n += all[i].state != IDLE;
  return n;
}

/* Starts who is due; returns when the next one is. */
static uint64_t start_due(Connection *all, uint64_t until_us) {
  if (!unstarted || draining) return until_us;
  uint64_t now = now_us();
  for (long i = 0; i < options.connections; i++) {
    Connection *c = &all[i];
    if (c->state != IDLE || c->start_at_us == 0) continue;
    if (c->start_at_us <= now) {
      c->start_at_us = 0;
      unstarted--;
      start_request(c);
    } else if (c->start_at_us < until_us) until_us = c->start_at_us;
  }
  return until_us;
}

static void run_until(Connection *all, uint64_t until_us) {
  struct epoll_event ready[512];
  for (uint64_t now; (now = now_us()) < until_us && !(draining && !underway(all));) {
    uint64_t next = start_due(all, until_us);
    now = now_us();
    uint64_t wait_us = next > now ? next - now : 0;
    struct timespec timeout = {wait_us / 1000000, wait_us % 1000000 * 1000};
    int n = epoll_pwait2(epoll_fd, ready, 512, &timeout, NULL);
    for (int i = 0; i < n; i++) {
      Connection *c = ready[i].data.ptr;
      if (ready[i].events & EPOLLOUT) {
        watch(c, EPOLL_CTL_MOD, 0);
        continue_sending(c);
      }
      if (ready[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) on_readable(c);
    }
  }
}

static void rendezvous(const char *word) {
  char line[16];
  printf("%s\n", word);
  fflush(stdout);
  if (!fgets(line, sizeof line, stdin)) exit(3); /* whoever started us has gone */
}

static int ascending(const void *a, const void *b) {
  uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
  return (x > y) - (x < y);
}

static void print_samples(const char *name, Samples *s) {
  qsort(s->values, s->count, sizeof *s->values, ascending);
#define AT(q) (s->count ? s->values[(size_t)((s->count - 1) * (q))] : 0)
  printf(",\"%s\":{\"count\":%zu,\"p50\":%u,\"p90\":%u,\"p99\":%u}", name, s->count, AT(.5), AT(.9), AT(.99));
#undef AT
}

static void print_result(double elapsed_s, long unfinished) {
  printf("{\"elapsed_s\":%.6f,\"done\":%lu,\"events\":%lu,\"reads\":%lu,\"answer_bytes\":%lu,\"issued\":%lu,\"answered\":%lu,"
         "\"unfinished\":%ld,\"reconnects\":%lu,\"bad_status\":%lu,\"incomplete\":%lu,\"altered\":%lu,\"closed\":%lu",
         elapsed_s, total.done, total.events, total.reads, total.answer_bytes, total.issued, total.answered, unfinished,
         total.reconnects, total.bad_status, total.incomplete, total.altered, total.closed);
  print_samples("latency_us", &total.latency_us);
  print_samples("first_byte_us", &total.first_byte_us);
  print_samples("event_delay_us", &total.event_delay_us);
  printf("}\n");
}

static void parse_options(int argc, char **argv) {
  const struct {
    const char *key;
    long *value;
  } numbers[] = {
      {"connections", &options.connections}, {"groups", &options.groups},         {"prefix", &options.prefix},
      {"own", &options.own},                 {"max_tokens", &options.max_tokens}, {"stream", &options.stream},
      {"pace_us", &options.pace_us},         {"think_us", &options.think_us},     {"stagger_us", &options.stagger_us},
      {"seed", &options.seed},
  };
  for (int i = 1; i < argc; i++) {
    char *value = strchr(argv[i], '=');
    if (!value) goto unknown;
    *value++ = 0;
    if (!strcmp(argv[i], "ports")) {
      for (char *port = strtok(value, ","); port && options.port_count < MAX_PORTS; port = strtok(NULL, ","))
        options.ports[options.port_count++] = atoi(port);
      continue;
    }
    if (!strcmp(argv[i], "warmup_s")) { options.warmup_s = atof(value); continue; }
    if (!strcmp(argv[i], "duration_s")) { options.duration_s = atof(value); continue; }
    for (size_t k = 0; k < sizeof numbers / sizeof *numbers; k++)
      if (!strcmp(argv[i], numbers[k].key)) {
        *numbers[k].value = atol(value);
        goto next;
      }
  unknown:
    fprintf(stderr, "loadgen: what is %s?\n", argv[i]);
    exit(2);
  next:;
  }
  if (!options.port_count || options.own > POOL_BYTES / 2) {
    fprintf(stderr, "loadgen: needs ports=..., and own= of at most %d\n", POOL_BYTES / 2);
    exit(2);
  }
}

int main(int argc, char **argv) {
  signal(SIGPIPE, SIG_IGN);
  parse_options(argc, argv);
  prepare_prompts();
  Samples *samples[] = {&total.latency_us, &total.first_byte_us, &total.event_delay_us};
  for (size_t i = 0; i < 3; i++) samples[i]->values = malloc(MAX_SAMPLES * sizeof(uint32_t));
  epoll_fd = epoll_create1(0);
  Connection *all = calloc(options.connections, sizeof *all);
  uint64_t start_us = now_us();
  for (long i = 0; i < options.connections; i++) {
    all[i].port = options.ports[i % options.port_count];
    all[i].request = malloc(most_request_bytes());
    open_connection(&all[i]);
    wait_until(&all[i], start_us + i * options.stagger_us);
  }
  run_until(all, start_us + options.warmup_s * 1e6);
  rendezvous("begin");
  measuring = 1;
  uint64_t begin_us = now_us();
  run_until(all, begin_us + options.duration_s * 1e6);
  measuring = 0;
  uint64_t end_us = now_us();
  rendezvous("end");
  draining = 1;
  run_until(all, now_us() + DRAIN_US);
  print_result((end_us - begin_us) / 1e6, underway(all));
}
