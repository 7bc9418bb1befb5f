/* Mock model servers: one process, one epoll loop, many ports of 127.0.0.1.
 *
 *   mock ENDPOINTS METRICS_PAGE [render]
 *
 * Prints "ports N N ..." once it listens (the kernel chooses the ports), and serves on each of them
 *   POST /v1/chat/completions, /v1/completions   the only routes that generate; knobs are found in the body's ends:
 *        "max_tokens":N  events of a stream, "stream":true, "pace_us":N  time between events (absent: flat out)
 *   POST .../render      404, or token ids when "render" was given. vllm-router's cache_aware asks this of every
 *                        worker for every request: a mock that took it for a completion made that router look twice
 *                        as dear per chunk. Counted apart from generations.
 *   GET  /metrics        METRICS_PAGE with this endpoint's own number of running requests in it
 *   GET  /mock/counters  what every endpoint was asked so far, as JSON
 *   GET  /health, /v1/models and what else the routers ask when they start
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
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define MAX_FDS 65536
#define MAX_ENDPOINTS 256
#define KNOB_WINDOW 400 /* bytes at either end of a body in which the knobs are looked for */

typedef struct {
  uint64_t generations, renders, other_posts, scrapes, running;
} Endpoint;

typedef struct {
  char *data;
  size_t used, capacity;
} Buffer;

typedef struct {
  int fd;
  Endpoint *endpoint;
  Buffer in, out;
  size_t sent; /* of out */
  int streaming, wants_write;
  long events_left;
  uint64_t pace_us, due_us; /* pace 0: flat out */
  int heap_at;              /* position among the paced streams, -1 when not there */
} Connection;

static Endpoint endpoints[MAX_ENDPOINTS];
static int endpoint_count, epoll_fd, serves_render;
static Connection *connections[MAX_FDS];
static Endpoint *listeners[MAX_FDS];
static Buffer metrics_page;
static size_t running_at, running_end; /* where the page says how many requests are running */

static char event_frame[512]; /* one event as an HTTP chunk */
static size_t event_frame_size, event_stamp_at;

/* ---- buffers ---- */

static void reserve(Buffer *b, size_t room) {
  if (b->capacity - b->used >= room) return;
  size_t capacity = b->capacity ? b->capacity : 4096;
  while (capacity - b->used < room) capacity *= 2;
  b->data = realloc(b->data, capacity);
  if (!b->data) abort();
  b->capacity = capacity;
}

static void append(Buffer *b, const char *data, size_t size) {
  reserve(b, size);
  memcpy(b->data + b->used, data, size);
  b->used += size;
}

static void append_text(Buffer *b, const char *text) { append(b, text, strlen(text)); }

static void consume(Buffer *b, size_t size) {
  memmove(b->data, b->data + size, b->used - size);
  b->used -= size;
}

/* ---- paced streams: a binary heap by due time ---- */

static Connection *heap[MAX_FDS];
static int heap_size;

static void heap_swap(int a, int b) {
  Connection *c = heap[a];
  heap[a] = heap[b];
  heap[b] = c;
  heap[a]->heap_at = a;
  heap[b]->heap_at = b;
}

static void heap_settle(int i) {
  for (; i > 0 && heap[i]->due_us < heap[(i - 1) / 2]->due_us; i = (i - 1) / 2) heap_swap(i, (i - 1) / 2);
  for (;;) {
    int least = i;
    for (int child = 2 * i + 1; child <= 2 * i + 2; child++)
      if (child < heap_size && heap[child]->due_us < heap[least]->due_us) least = child;
    if (least == i) return;
    heap_swap(i, least);
    i = least;
  }
}

static void heap_add(Connection *c) {
  c->heap_at = heap_size;
  heap[heap_size++] = c;
  heap_settle(c->heap_at);
}

static void heap_remove(Connection *c) {
  int i = c->heap_at;
  if (i < 0) return;
  heap_swap(i, --heap_size);
  c->heap_at = -1;
  if (i < heap_size) heap_settle(i);
}

/* ---- writing; the result is 0 when all is out, 1 when the socket is full, -1 when the peer has gone ---- */

static void watch_writable(Connection *c, int on) {
  if (c->wants_write == on) return;
  c->wants_write = on;
  struct epoll_event e = {.events = EPOLLIN | (on ? EPOLLOUT : 0), .data.fd = c->fd};
  epoll_ctl(epoll_fd, EPOLL_CTL_MOD, c->fd, &e);
}

static int flush(Connection *c) {
  while (c->sent < c->out.used) {
    ssize_t n = send(c->fd, c->out.data + c->sent, c->out.used - c->sent, MSG_NOSIGNAL);
    if (n < 0 && errno != EAGAIN) return -1;
    if (n < 0) {
      watch_writable(c, 1);
      return 1;
    }
    c->sent += n;
  }
  c->sent = c->out.used = 0;
  watch_writable(c, 0);
  return 0;
}

static void reply_head(Connection *c, const char *status, const char *content_type, size_t size) {
  char head[256];
  append(&c->out, head,
         snprintf(head, sizeof head, "HTTP/1.1 %s\r\ncontent-type: %s\r\ncontent-length: %zu\r\nserver: mock\r\n\r\n",
                  status, content_type, size));
}

static void reply_json(Connection *c, const char *json) {
  reply_head(c, "200 OK", "application/json", strlen(json));
  append_text(&c->out, json);
}

static void reply_not_found(Connection *c) {
  static const char json[] = "{\"detail\":\"Not Found\"}";
  reply_head(c, "404 Not Found", "application/json", strlen(json));
  append_text(&c->out, json);
}

/* One event is one send, as a real server does it. */
static int send_event(Connection *c) {
  char digits[STAMP_DIGITS + 1];
  snprintf(digits, sizeof digits, "%0*llu", STAMP_DIGITS, (unsigned long long)now_us());
  memcpy(event_frame + event_stamp_at, digits, STAMP_DIGITS);
  append(&c->out, event_frame, event_frame_size);
  c->events_left--;
  return flush(c);
}

static int end_stream(Connection *c) {
  static const char end[] = "e\r\n" EVENT_DONE "\r\n0\r\n\r\n"; /* e: the 14 bytes of EVENT_DONE */
  append(&c->out, end, sizeof end - 1);
  c->streaming = 0;
  c->endpoint->running--;
  return flush(c);
}

static int stream_flat_out(Connection *c) {
  while (c->events_left > 0) {
    int state = send_event(c);
    if (state) return state;
  }
  return end_stream(c);
}

static int start_stream(Connection *c, long events, uint64_t pace_us) {
  static const char head[] = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
                             "cache-control: no-cache\r\nserver: mock\r\ntransfer-encoding: chunked\r\n\r\n";
  append(&c->out, head, sizeof head - 1);
  c->streaming = 1;
  c->endpoint->running++;
  c->events_left = events;
  c->pace_us = pace_us;
  if (!pace_us) return stream_flat_out(c);
  c->due_us = now_us() + pace_us;
  int state = send_event(c);
  if (state >= 0) heap_add(c);
  return state;
}

static void drop(Connection *c) {
  heap_remove(c);
  if (c->streaming) c->endpoint->running--;
  connections[c->fd] = NULL;
  close(c->fd);
  free(c->in.data);
  free(c->out.data);
  free(c);
}

/* ---- requests ---- */

static const char *find_knob(const char *body, size_t size, const char *key) {
  size_t window = size < KNOB_WINDOW ? size : KNOB_WINDOW, length = strlen(key);
  const char *at = memmem(body + size - window, window, key, length);
  if (!at) at = memmem(body, window, key, length);
  if (!at) return NULL;
  at += length;
  while (*at == ' ') at++;
  return at;
}

static long knob(const char *body, size_t size, const char *key, long otherwise) {
  const char *value = find_knob(body, size, key);
  return value ? atol(value) : otherwise;
}

static int generate(Connection *c, const char *body, size_t size) {
  c->endpoint->generations++;
  const char *stream = find_knob(body, size, "\"stream\":");
  if (stream && *stream == 't')
    return start_stream(c, knob(body, size, "\"max_tokens\":", 16), knob(body, size, "\"pace_us\":", 0));
  char answer[1024];
  long tokens = size / 4;
  snprintf(answer, sizeof answer, ANSWER_FORMAT, tokens, tokens + 16);
  reply_json(c, answer);
  return 0;
}

static void render(Connection *c, const char *body, size_t size) {
  c->endpoint->renders++;
  if (!serves_render) {
    reply_not_found(c);
    return;
  }
  Buffer ids = {0};
  append_text(&ids, "{\"request_id\":\"r\",\"model\":\"" MODEL "\",\"token_ids\":[0");
  for (size_t at = 0; at + 4 <= size; at += 4) { /* one id for four bytes, the same for the same bytes */
    uint32_t four;
    char digits[16];
    memcpy(&four, body + at, 4);
    append(&ids, digits, snprintf(digits, sizeof digits, ",%u", four * 2654435761u % 128000));
  }
  append(&ids, "]}", 3); /* with its NUL */
  reply_json(c, ids.data);
  free(ids.data);
}

static void scrape(Connection *c) {
  c->endpoint->scrapes++;
  char running[32];
  int digits = snprintf(running, sizeof running, "%llu.0", (unsigned long long)c->endpoint->running);
  reply_head(c, "200 OK", "text/plain; version=0.0.4", metrics_page.used - (running_end - running_at) + digits);
  append(&c->out, metrics_page.data, running_at);
  append(&c->out, running, digits);
  append(&c->out, metrics_page.data + running_end, metrics_page.used - running_end);
}

static void reply_counters(Connection *c) {
  Buffer json = {0};
  for (int i = 0; i < endpoint_count; i++) {
    Endpoint *e = &endpoints[i];
    char row[256];
    int n = snprintf(row, sizeof row,
                     "%c{\"generations\":%lu,\"renders\":%lu,\"other_posts\":%lu,\"scrapes\":%lu,\"running\":%lu}",
                     i ? ',' : '[', e->generations, e->renders, e->other_posts, e->scrapes, e->running);
    append(&json, row, n);
  }
  append(&json, "]", 2); /* with its NUL */
  reply_json(c, json.data);
  free(json.data);
}

/* What the routers ask before they send requests. */
static const struct {
  const char *path, *answer;
} canned[] = {
    {"/health", "{}"},
    {"/v1/models", "{\"object\":\"list\",\"data\":[{\"id\":\"" MODEL "\",\"object\":\"model\",\"created\":1760000000,"
                   "\"owned_by\":\"vllm\",\"root\":\"" MODEL "\",\"parent\":null,\"max_model_len\":262144}]}"},
    {"/version", "{\"version\":\"0.32.0\"}"},
    {"/get_model_info", "{\"model_path\":\"" MODEL "\",\"tokenizer_path\":\"" MODEL "\",\"is_generation\":true}"},
    {"/model_info", "{\"model_path\":\"" MODEL "\",\"tokenizer_path\":\"" MODEL "\",\"is_generation\":true}"},
    {"/get_server_info", "{\"model_path\":\"" MODEL "\",\"served_model_name\":\"" MODEL "\",\"tp_size\":1,\"dp_size\":1}"},
    {"/server_info", "{\"model_path\":\"" MODEL "\",\"served_model_name\":\"" MODEL "\",\"tp_size\":1,\"dp_size\":1}"},
    {"/get_load", "{\"load\":0}"},
    {"/load", "{\"server_load\":0}"},
};

static void reply_canned(Connection *c, const char *path) {
  for (size_t i = 0; i < sizeof canned / sizeof *canned; i++)
    if (!strcmp(path, canned[i].path)) {
      reply_json(c, canned[i].answer);
      return;
    }
  reply_not_found(c);
}

static int answer(Connection *c, int is_post, const char *path, const char *body, size_t size) {
  if (is_post && (!strcmp(path, "/v1/chat/completions") || !strcmp(path, "/v1/completions"))) return generate(c, body, size);
  if (is_post && strstr(path, "/render")) render(c, body, size);
  else if (is_post) c->endpoint->other_posts++, reply_canned(c, path);
  else if (!strcmp(path, "/metrics")) scrape(c);
  else if (!strcmp(path, "/mock/counters")) reply_counters(c);
  else reply_canned(c, path);
  return 0;
}

/* Where a chunked body ends, or 0 when it is not all here. The frames stay in it: only knobs are looked for. */
static size_t chunked_end(const char *in, size_t head, size_t used) {
  for (size_t at = head;;) {
    const char *line_end = memmem(in + at, used - at, "\r\n", 2);
    if (!line_end) return 0;
    size_t size = strtoul(in + at, NULL, 16);
    at = line_end + 2 - in + size + 2;
    if (at > used) return 0;
    if (!size) return at;
  }
}

/* Answer every complete request in the buffer, one stream at a time; -1 when the connection is to be dropped. */
static int serve(Connection *c) {
  while (!c->streaming) {
    char *end = c->in.used ? memmem(c->in.data, c->in.used, "\r\n\r\n", 4) : NULL;
    if (!end) return 0;
    size_t head = end - c->in.data + 4, size = 0;
    int chunked = 0;
    char path[256] = "", *target = strchr(c->in.data, ' ');
    if (!target) return -1;
    snprintf(path, sizeof path, "%.*s", (int)strcspn(target + 1, " \r"), target + 1);
    for (char *line = memmem(c->in.data, head, "\r\n", 2) + 2; line < end; line = memmem(line, end + 2 - line, "\r\n", 2) + 2) {
      if (!strncasecmp(line, "content-length:", 15)) size = strtoul(line + 15, NULL, 10);
      if (!strncasecmp(line, "transfer-encoding:", 18)) chunked = 1;
    }
    size_t all = chunked ? chunked_end(c->in.data, head, c->in.used) : head + size;
    if (!all || c->in.used < all) return 0;
    if (answer(c, c->in.data[0] == 'P', path, c->in.data + head, all - head) < 0) return -1;
    consume(&c->in, all);
    if (flush(c) < 0) return -1;
  }
  return 0;
}

/* ---- events ---- */

static int on_readable(Connection *c) {
  for (;;) {
    reserve(&c->in, 131072);
    size_t room = c->in.capacity - c->in.used - 1; /* a byte for the NUL that stops strchr and strtoul */
    ssize_t n = recv(c->fd, c->in.data + c->in.used, room, 0);
    if (n == 0 || (n < 0 && errno != EAGAIN)) return -1;
    if (n < 0) break;
    c->in.used += n;
    if ((size_t)n < room) break;
  }
  c->in.data[c->in.used] = 0;
  return serve(c);
}

static int on_writable(Connection *c) {
  int state = flush(c);
  if (state == 0 && c->streaming && !c->pace_us) state = stream_flat_out(c);
  if (state == 0 && !c->streaming) state = serve(c);
  return state;
}

static void on_connection(int listener) {
  int fd, on = 1;
  while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    Connection *c = calloc(1, sizeof *c);
    *c = (Connection){.fd = fd, .endpoint = listeners[listener], .heap_at = -1};
    connections[fd] = c;
    struct epoll_event e = {.events = EPOLLIN, .data.fd = fd};
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &e);
  }
}

static void send_due(void) {
  uint64_t now = now_us();
  while (heap_size && heap[0]->due_us <= now) {
    Connection *c = heap[0];
    int state;
    if (c->events_left > 0) {
      c->due_us += c->pace_us;
      if (c->due_us <= now) c->due_us = now + 1; /* late: catch up, but let the others have a turn */
      heap_settle(0);
      state = send_event(c);
    } else {
      heap_remove(c);
      state = end_stream(c);
      if (state >= 0) state = serve(c);
    }
    if (state < 0) drop(c);
  }
}

/* Whole milliseconds, rounded up: streams due within the same one are sent together, in different sends. */
static int wait_ms(void) {
  if (!heap_size) return -1;
  uint64_t now = now_us();
  return heap[0]->due_us <= now ? 0 : (heap[0]->due_us - now + 999) / 1000;
}

static void run(void) {
  struct epoll_event ready[512];
  for (;;) {
    int n = epoll_wait(epoll_fd, ready, 512, wait_ms());
    for (int i = 0; i < n; i++) {
      int fd = ready[i].data.fd, state = 0;
      if (listeners[fd]) {
        on_connection(fd);
        continue;
      }
      Connection *c = connections[fd];
      if (ready[i].events & EPOLLOUT) state = on_writable(c);
      if (state >= 0 && ready[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) state = on_readable(c);
      if (state < 0) drop(c);
    }
    send_due();
  }
}

/* ---- start ---- */

static void die(const char *what) {
  perror(what);
  exit(1);
}

static int listen_anywhere(Endpoint *endpoint) {
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  socklen_t size = sizeof address;
  int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
  if (bind(fd, (void *)&address, sizeof address) || listen(fd, 4096)) die("listen");
  getsockname(fd, (void *)&address, &size);
  struct epoll_event e = {.events = EPOLLIN, .data.fd = fd};
  epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &e);
  listeners[fd] = endpoint;
  return ntohs(address.sin_port);
}

static void read_metrics_page(const char *name) {
  FILE *file = fopen(name, "r");
  if (!file) die(name);
  size_t n;
  do {
    reserve(&metrics_page, 65536);
    n = fread(metrics_page.data + metrics_page.used, 1, 65535, file);
    metrics_page.used += n;
  } while (n);
  fclose(file);
  metrics_page.data[metrics_page.used] = 0;
  char *line = strstr(metrics_page.data, "\nvllm:num_requests_running{");
  char *value = line ? strstr(line, "} ") : NULL;
  if (!value) die("no vllm:num_requests_running in the metrics page");
  running_at = value + 2 - metrics_page.data;
  running_end = strchr(value, '\n') - metrics_page.data;
}

static void make_event_frame(void) {
  char event[500];
  int size = snprintf(event, sizeof event, EVENT_FORMAT, STAMP_DIGITS, 0ULL);
  event_frame_size = snprintf(event_frame, sizeof event_frame, "%x\r\n%s\r\n", size, event);
  event_stamp_at = strstr(event_frame, STAMP_KEY) + strlen(STAMP_KEY) - event_frame;
}

int main(int argc, char **argv) {
  if (argc < 3 || atoi(argv[1]) < 1 || atoi(argv[1]) > MAX_ENDPOINTS) {
    fprintf(stderr, "usage: mock ENDPOINTS METRICS_PAGE [render]\n");
    return 2;
  }
  signal(SIGPIPE, SIG_IGN);
  endpoint_count = atoi(argv[1]);
  read_metrics_page(argv[2]);
  serves_render = argc > 3 && !strcmp(argv[3], "render");
  make_event_frame();
  epoll_fd = epoll_create1(0);
  printf("ports");
  for (int i = 0; i < endpoint_count; i++) printf(" %d", listen_anywhere(&endpoints[i]));
  printf("\n");
  fflush(stdout);
  run();
}
