// Which expert kernels run: chosen once, by what the CPU has and what $MODES_ISA says.
#include <cstdlib>
#include <string_view>

#include "common/message.h"
#include "cpu/experts.h"

namespace modes {
namespace {

struct Isa {
  const ExpertKernels* floats;
  const ExpertKernels* pairs;  // for bfloat16 with bfloat16, where words are pairs; else null
  bool here;
};

struct Choice {
  Isa isa;
  const char* refused;  // what $MODES_ISA says when it cannot be had, else null
};

const Choice& choice() {
  static const Choice chosen = [] {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const Isa known[] = {{&kAvx512Kernels, &kAvx512Bf16Kernels, avx512 && __builtin_cpu_supports("avx512bf16")},
                         {&kAvx512Kernels, nullptr, avx512},
                         {&kAvx2Kernels, nullptr, avx2},
                         {&kPlainKernels, nullptr, true}};
#else
    const Isa known[] = {{&kPlainKernels, nullptr, true}};
#endif
    const char* asked = std::getenv("MODES_ISA");
    const Isa* widest = nullptr;
    for (const Isa& isa : known) {
      if (!isa.here) continue;
      if (!widest) widest = &isa;
      if (asked && std::string_view(asked) == (isa.pairs ? isa.pairs : isa.floats)->isa) return Choice{isa, nullptr};
    }
    return Choice{*widest, asked && *asked ? asked : nullptr};
  }();
  return chosen;
}

}  // namespace

const ExpertKernels& expert_kernels(const modes_args& args) {
  const Isa& isa = choice().isa;
  const bool pairs = args.activation_dtype == MODES_BF16 && args.weight_dtype == MODES_BF16;
  return pairs && isa.pairs ? *isa.pairs : *isa.floats;
}

modes_status check_isa(modes_message* message) {
  const char* refused = choice().refused;
  if (!refused) return MODES_OK;
  return fail(message, MODES_BAD_ARGUMENT,
              "MODES_ISA is `%s`, expected avx512_bf16, avx512, avx2 or baseline, and one that this CPU has (it has %s)",
              refused, modes_cpu_isa());
}

}  // namespace modes

const char* modes_cpu_isa(void) {
  const modes::Isa& isa = modes::choice().isa;
  return (isa.pairs ? isa.pairs : isa.floats)->isa;
}
