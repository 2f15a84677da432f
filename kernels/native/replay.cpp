// Calls that were recorded, one after another without the interpreter in between.

#include <bit>
#include <cstdint>
#include <cstring>
#include <utility>

namespace {

using Word = std::uint64_t;
using Invoke = void (*)(void* function, const Word* words);

// Types of arguments, a letter each as in kernels/native/library.py.
template <std::size_t Size>
struct Letters {
  char at[Size];
  constexpr Letters(const char (&text)[Size]) {
    for (std::size_t i = 0; i < Size; ++i) at[i] = text[i];
  }
};

template <char Letter>
auto unpack(Word word) {
  static_assert(Letter == 'p' || Letter == 'i' || Letter == 'f' || Letter == 'n');
  if constexpr (Letter == 'p') return reinterpret_cast<void*>(word);
  if constexpr (Letter == 'i') return static_cast<std::int64_t>(word);
  if constexpr (Letter == 'f') return std::bit_cast<float>(static_cast<std::uint32_t>(word));
  if constexpr (Letter == 'n') return static_cast<int>(word);
}

template <Letters Types>
void invoke(void* function, const Word* words) {
  [&]<std::size_t... I>(std::index_sequence<I...>) {
    using Function = void (*)(decltype(unpack<Types.at[I]>(0))...);
    reinterpret_cast<Function>(function)(unpack<Types.at[I]>(words[I])...);
  }(std::make_index_sequence<sizeof(Types.at) - 1>{});
}

struct Signature {
  const char* types;
  Invoke invoke;
};

template <Letters Types>
constexpr Signature signature() {
  return {Types.at, invoke<Types>};
}

// Of the kernels that a step calls.
constexpr Signature kSignatures[] = {
    signature<"pipppiiiinn">(),            // linear
    signature<"pippppiiiinn">(),           // int8_linear
    signature<"pipppiiiin">(),             // linear_silu_and_mul
    signature<"pppiin">(),                 // linear_rows, plain_rows
    signature<"ppppiin">(),                // rotary_angles, int8_rows
    signature<"pipiin">(),                 // silu_and_mul
    signature<"pippfppiin">(),             // rms_norm
    signature<"pipipippfpppppiiiiin">(),   // rotary_append
    signature<"pipfpppiiin">(),            // norm_rotary
    signature<"pipipppiiiin">(),           // kv_append
    signature<"pippppppiiiiiifn">(),       // paged_attention
};

struct Call {
  void* function;
  Invoke invoke;
  const Word* words;
};

}  // namespace

// What calls a function of these types; null where no kernel of a step has them.
extern "C" Invoke baton_signature(const char* types) {
  for (const Signature& signature : kSignatures)
    if (std::strcmp(signature.types, types) == 0) return signature.invoke;
  return nullptr;
}

extern "C" void baton_replay(const Call* calls, std::int64_t count) {
  for (const Call* call = calls; call < calls + count; ++call) call->invoke(call->function, call->words);
}
