/* What the mock model server and the load generator agree on: the text of an answer, in vLLM's chat form. */
#ifndef WIRE_H
#define WIRE_H
#include <stdint.h>
#include <time.h>

#define MODEL "tiny" /* the model of metrics_page.txt */

/* A streamed event carries the time the mock sent it: CLOCK_MONOTONIC in us, always STAMP_DIGITS digits. */
#define STAMP_KEY "\"stamp\":"
#define STAMP_DIGITS 16
#define EVENT_FORMAT                                                                                      \
  "data: {\"id\":\"chatcmpl-0123456789abcdef0123456789abcdef\",\"object\":\"chat.completion.chunk\","      \
  "\"created\":1760000000,\"model\":\"" MODEL "\"," STAMP_KEY "%0*llu,\"choices\":[{\"index\":0,\"delta\":"   \
  "{\"content\":\" token\"},\"logprobs\":null,\"finish_reason\":null,\"token_ids\":null}]}\n\n"
#define EVENT_DONE "data: [DONE]\n\n"

/* A whole answer; the number is padded with spaces so that every answer has the same length. */
#define ANSWER_FORMAT                                                                                     \
  "{\"id\":\"chatcmpl-0123456789abcdef0123456789abcdef\",\"object\":\"chat.completion\","                  \
  "\"created\":1760000000,\"model\":\"" MODEL "\",\"choices\":[{\"index\":0,\"message\":{\"role\":"           \
  "\"assistant\",\"content\":\"A short answer, always the same.\"},\"logprobs\":null,\"finish_reason\":"     \
  "\"stop\",\"stop_reason\":null}],\"usage\":{\"prompt_tokens\":%-8ld,\"total_tokens\":%-8ld,"             \
  "\"completion_tokens\":16,\"prompt_tokens_details\":null}}"

static inline uint64_t now_us(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}
#endif
