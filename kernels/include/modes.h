/* Skipped-expert MoE layer: the one contract between the kernels and whoever calls them.
 *
 *   for each token t and top-k slot j, with w = expert_weights:
 *     pi    = w[t,j] / (w[t,0] + ... + w[t,k-1])                  sum taken in slot order, float32
 *     s     = score ? score[t,j] : score_scale[group[t](, expert)] * pi
 *     keep  = s >= tau[group[t]]
 *   out[t]  = sum over kept j, in a fixed order, of w[t,j] * expert_e(x[t])    e = expert_ids[t,j]
 *   expert_e(v) = down[e] . act(gate[e] . v + gate_bias[e], up[e] . v + up_bias[e]) + down_bias[e]
 *
 * This is the modulated threshold of MoDES (arXiv:2511.15690, eq. 3 and 5): score_scale is the layer importance alpha
 * of a token group, pi the routing probability, tau the threshold of the group. Kept weights are not renormalised.
 *
 * The pair is decided in float32 without fused multiply-add, so that plain float32 code elsewhere decides the same.
 * tau = 0 keeps every pair, tau = +inf none (the output is then exactly 0). A comparison with NaN keeps the pair:
 * the NaN of one token shows in that token's output, and in no other's, instead of turning into zeros.
 *
 * Sums are float32 whatever the dtypes. With bfloat16 activations and weights, act(...) is rounded to bfloat16 before it
 * meets `down` where the CPU multiplies bfloat16 (as PyTorch does). Same input, same bits, whatever the number of threads.
 * Not the same bits: on another instruction set, or for a token among other tokens (an expert with many rows is summed in
 * another order than one with few).
 * Offsets are 64-bit. Nothing is retained after a call returns. Calls may run at the same time from many threads.
 */
#ifndef MODES_H_
#define MODES_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define MODES_EXPORT __declspec(dllexport)
#else
#define MODES_EXPORT __attribute__((visibility("default")))
#endif

typedef enum modes_status {
  MODES_OK = 0,
  MODES_BAD_ARGUMENT = 1,  /* a null or misaligned pointer, an unknown enumerator, another version of modes_args */
  MODES_BAD_SHAPE = 2,     /* a size that is not positive, or sizes whose product overflows */
  MODES_BAD_EXPERT_ID = 3, /* an expert id outside 0..E-1; the message names token and slot */
  MODES_BAD_GROUP = 4,     /* a group outside 0..G-1; the message names the token */
  MODES_BAD_WORKSPACE = 5, /* the workspace is smaller than asked for, or not aligned */
  MODES_NO_MEMORY = 6,
  MODES_PARALLEL_FOR = 7, /* the caller's parallel_for returned non-zero */
  MODES_NO_DEVICE = 8, /* no CUDA device that the kernels run on, or no driver */
  MODES_CUDA = 9       /* a CUDA call failed; the message has its error */
} modes_status;

typedef enum modes_dtype {
  MODES_F32 = 0,
  MODES_F16 = 1,
  MODES_BF16 = 2,
  MODES_I8 = 3, /* these two: of weights only, see modes_args.gate_up_scales */
  MODES_I4 = 4
} modes_dtype;
typedef enum modes_id_dtype { MODES_I64 = 0, MODES_I32 = 1 } modes_id_dtype;

typedef enum modes_activation {
  MODES_SILU = 0,       /* gate * sigmoid(gate) * up */
  MODES_GELU_TANH = 1,  /* gelu(gate), tanh form, * up */
  MODES_SWIGLU_OAI = 2  /* g = min(gate, limit), u = clamp(up, +-limit): g * sigmoid(alpha * g) * (u + 1) */
} modes_activation;

/* T tokens, H hidden, I intermediate, E experts, k = top_k, G groups. "A" is activation_dtype, "W" weight_dtype.
 * gate_up, down, scales and biases may have any alignment (they are read where a file was mapped); every other pointer is
 * aligned to its element. `out` overlaps no input. */
typedef struct modes_args {
  uint64_t struct_size; /* sizeof(modes_args) */
  int64_t tokens, hidden, intermediate, experts, top_k, groups; /* tokens may be 0, the others may not */
  int32_t activation_dtype;       /* modes_dtype */
  int32_t weight_dtype;           /* modes_dtype; may differ from activation_dtype */
  int32_t id_dtype;               /* modes_id_dtype */
  int32_t activation;             /* modes_activation */
  float alpha, limit;             /* swiglu_oai only */
  int32_t transposed;             /* 0: gate_up [E, 2I, H], down [E, H, I];  1: gate_up [E, H, 2I], down [E, I, H] */
  int32_t interleaved;            /* 0: I gate rows, then I up rows;  1: gate and up rows in turn */
  int32_t score_scale_per_expert; /* 0: score_scale [G];  1: score_scale [G, E] */
  int32_t threads;                /* of the library's own pool; 0: modes_cpu_threads(). No effect with a parallel_for */
  const void* x;                  /* [T, H] A */
  const void* expert_ids;         /* [T, k] id_dtype, 0 <= id < E, checked */
  const void* expert_weights;     /* [T, k] A: what the expert's output is multiplied with */
  const int32_t* group;           /* [T]    0 <= group < G, checked */
  const float* tau;               /* [G] */
  const float* score_scale;       /* [G] or [G, E] */
  const float* score;             /* [T, k] or null: compared with tau instead of score_scale * pi */
  const void* gate_up;            /* W */
  const void* down;               /* W */
  const void* gate_up_bias;       /* [E, 2I] W or null, ordered as the rows of gate_up */
  const void* down_bias;          /* [E, H] W or null */
  void* out;                      /* [T, H] A, fully written; unspecified after an error */
  int64_t* kept;                  /* [G] or null: receives the number of kept pairs of each group */
  const void* gate_up_scales;     /* [E, 2I, ceil(H / block)] float16; quantised weights only, as is what follows */
  const void* down_scales;        /* [E, H, ceil(I / block)] float16 */
  int64_t block;                  /* elements that share a scale: 32, or a multiple */
} modes_args;

/* Quantised weights are symmetric and block-wise: element d of a row is q[d] * scale[d / block], exact in float32, and the
 * result has the bits that these products have as float32 weights. Rows lie along the depth (transposed is 0) and are filled
 * up with zeros to a multiple of 32 elements. MODES_I8: q is int8. MODES_I4: of each 32 elements, byte i of 16 holds element i
 * in its lower and element 16 + i in its upper half, both in two's complement. Biases are float32. CPU only so far. */

/* Runs task(state, i) once for each i in 0..tasks-1, in any order, on any threads, and returns when all have run:
 * 0, or anything else for failure. */
typedef void (*modes_task)(void* state, size_t index);
typedef struct modes_parallel_for {
  void* context;
  int (*run)(void* context, size_t tasks, modes_task task, void* state);
} modes_parallel_for;

/* A null-terminated English sentence; empty after MODES_OK. */
typedef struct modes_message {
  char text[256];
} modes_message;

#define MODES_ALIGNMENT 64
#define MODES_CUDA_ALIGNMENT 256 /* of a workspace on a CUDA device */

/* "0.1.0" */
MODES_EXPORT const char* modes_version(void);

/* Scratch bytes that modes_cpu_skip_experts needs for these sizes and dtypes; pointers are not read. Grows with the
 * tokens up to about 128 MiB; float16 and bfloat16 activations may add a float32 copy of x. Threads take a few hundred KiB
 * each on top, which the library keeps between calls. */
MODES_EXPORT modes_status modes_cpu_workspace_size(const modes_args* args, size_t* bytes, modes_message* message);

/* Host memory only. `parallel_for` null: the library's own threads. `workspace` null: scratch memory that the library
 * keeps between calls. `message` may be null. */
MODES_EXPORT modes_status modes_cpu_skip_experts(const modes_args* args, const modes_parallel_for* parallel_for,
                                                 void* workspace, size_t workspace_bytes, modes_message* message);

/* Routing, scores, or both, of one layer: what comes before modes_skip_experts, float32, per token t and slot j.
 *
 *   with logits    softmax_first: w, e = the k largest of softmax(logits[t]), divided by their sum with `normalise`
 *                  otherwise:     w = softmax of the k largest logits, e = their experts
 *                  in falling order; of equal ones the lower expert comes first. Written to expert_weights and expert_ids.
 *   without        both are read.
 *   with score     pi = w[j] / (w[0] + ... + w[k-1]), the sum taken in slot order
 *                  l = predictor_logits[t] + predictor_bias,   m = logsumexp(l[e[0..k-1]]) - logsumexp(l)
 *                  n = exp(clamp(coefficients[e] . (l, m, 1), range) - range[1])
 *                  score = score_scale * pi * n
 *     and saliency u = exp(power * (clamp(saliency[g] . (x[t], 1), saliency_range[g]) - saliency_range[g][1]))
 *                  score = score_scale * max(pi * n * sqrt(pi) * u, 2^-24)        g = group[t] % saliency_groups
 *
 * A NaN stays in its token. Same input, same bits, whatever the number of threads. */
typedef struct modes_route_args {
  uint64_t struct_size;           /* sizeof(modes_route_args) */
  int64_t tokens, experts, top_k; /* tokens may be 0, the others may not; top_k <= experts */
  int64_t groups;                 /* of score_scale; what follows has no effect without a score */
  int64_t hidden;                 /* of x */
  int64_t saliency_groups;
  int32_t softmax_first, normalise;
  int32_t score_scale_per_expert; /* 0: score_scale [G];  1: score_scale [G, E] */
  float power;
  const float* logits;            /* [T, E] or null */
  int64_t* expert_ids;            /* [T, k] written with logits; else read, 0 <= id < E, checked */
  float* expert_weights;          /* [T, k] the same */
  const int32_t* group;           /* [T]    0 <= group < G, checked */
  const float* score_scale;       /* [G] or [G, E] */
  const float* x;                 /* [T, H] what the experts are given; with saliency only */
  const float* predictor_logits;  /* [T, E] */
  const float* predictor_bias;    /* [E] or null */
  const float* coefficients;      /* [E, E + 2] */
  const float* range;             /* [2] smallest and largest */
  const float* saliency;          /* [saliency_groups, H + 1] or null */
  const float* saliency_range;    /* [saliency_groups, 2] */
  float* score;                   /* [T, k] or null */
} modes_route_args;

/* Host memory only. `parallel_for` null: on the calling thread. `message` may be null. */
MODES_EXPORT modes_status modes_cpu_route(const modes_route_args* args, const modes_parallel_for* parallel_for,
                                          modes_message* message);

/* Threads that the library's own pool uses where a call asks for 0: what was set last, else $MODES_NUM_THREADS, else
 * the processors this process may run on. Setting 0 or less returns to that default. */
MODES_EXPORT void modes_cpu_set_threads(int32_t threads);
MODES_EXPORT int32_t modes_cpu_threads(void);

/* The instruction set the expert kernels were chosen for: "avx512_bf16", "avx512", "avx2" or "baseline". The widest that
 * the CPU has; $MODES_ISA names a narrower one (to compare, or to test them all on one machine). When it names something
 * else, every call fails with MODES_BAD_ARGUMENT. */
MODES_EXPORT const char* modes_cpu_isa(void);

/* ---- libmodes_cuda.so only ----
 *
 * Every pointer of the arguments, kept too, is memory of the current CUDA device. Nothing of it is read by the host: a
 * call only launches, on `stream`, with grids that depend on sizes and the device alone, allocates nothing and waits for
 * nothing. So it can be captured in a CUDA graph, and an expert id or a group that is out of range is not an error: all
 * elements of that token's output become NaN, and the pair is not counted in kept. No atomics on floats: same input, same
 * bits on the same kind of device.
 *
 * T * k is below 2^31, E at most 1024, k at most 64, H and I at most 2^20. */

/* Devices that this process may use: 0, and MODES_OK, where there is none or no driver. */
MODES_EXPORT modes_status modes_cuda_devices(int32_t* count, modes_message* message);

/* Scratch bytes that modes_cuda_skip_experts needs for these sizes and dtypes; neither pointers nor a device are looked
 * at. Never less for more tokens; many tokens are done in rounds, so that it stays near 2 GiB. */
MODES_EXPORT modes_status modes_cuda_workspace_size(const modes_args* args, size_t* bytes, modes_message* message);

/* The kernels that would compute these arguments on the current device, or the first round of them: "hopper", "decode",
 * "mma", "float" or "plain". $MODES_CUDA_PATH forces one: MODES_BAD_ARGUMENT where that does not fit. */
MODES_EXPORT modes_status modes_cuda_path(const modes_args* args, const char** name, modes_message* message);

/* `stream` is a cudaStream_t, null for the default stream. `workspace` is required, aligned to MODES_CUDA_ALIGNMENT, and
 * in use until the stream has passed the call. `threads` has no effect. MODES_OK says that the work was launched. */
MODES_EXPORT modes_status modes_cuda_skip_experts(const modes_args* args, void* stream, void* workspace,
                                                  size_t workspace_bytes, modes_message* message);

#ifdef __cplusplus
}
#endif
#endif
