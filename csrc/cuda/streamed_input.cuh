// x of a group in shared memory, with what is done to it on the way (Fusion in weight.h): one row.
#pragma once

#include <type_traits>

#include "streamed_layout.cuh"

namespace squeezellm_hf::cuda::streamed {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

template <class T>
__device__ __forceinline__ float sum_of_squares(const uint4& piece) {
  const auto* values = reinterpret_cast<const T*>(&piece);
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) sum += to_float(values[i]) * to_float(values[i]);
  return sum;
}

// Rounded where the layer that does it is: behind the scale, and behind the weight.
template <class T>
__device__ __forceinline__ uint4 normalized(const uint4& piece, const uint4& weight, float scale) {
  const auto* values = reinterpret_cast<const T*>(&piece);
  const auto* weights = reinterpret_cast<const T*>(&weight);
  uint4 result;
#pragma unroll
  for (int i = 0; i < 8; ++i)
    reinterpret_cast<T*>(&result)[i] =
        from_float<T>(to_float(weights[i]) * to_float(from_float<T>(to_float(values[i]) * scale)));
  return result;
}

// Of 16-bit values, a product is rounded once.
template <class T>
__device__ __forceinline__ uint4 product(const uint4& one, const uint4& other) {
  using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  uint4 result;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    reinterpret_cast<Pair*>(&result)[i] =
        __hmul2(reinterpret_cast<const Pair*>(&one)[i], reinterpret_cast<const Pair*>(&other)[i]);
  return result;
}

// Whether a norm's scale, one number for all of x, is applied to the sums: of 16-bit types, to the one with the range
// of fp32, whose products with the norm's weight are all within it.
template <class T>
constexpr bool kScalesSums = std::is_same_v<T, __nv_bfloat16>;

template <int kWarps>
__device__ __forceinline__ float norm_scale(const float* squares, const LinearCall& call, const Fusion& fusion) {
  float total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) total += squares[w];
  return rsqrtf(total / static_cast<float>(call.weight.in_features) + fusion.norm_epsilon);
}

// By the looking-up warps: each thread its own pieces of 8 activations, zeros beyond x.
template <class T, int kWarps>
class Input {
 public:
  // `squares`: of x, a sum of each warp.
  __device__ Input(unsigned char* x, float* squares, const LinearCall& call, const Fusion& fusion, int padded_pieces)
      : x_(x),
        squares_(squares),
        call_(call),
        fusion_(fusion),
        pieces_(call.weight.in_features / 8),
        padded_(padded_pieces) {}

  // Calls all_read() when what is read has come.
  template <class AllRead>
  __device__ void load(const AllRead& all_read) {
    const auto* source = static_cast<const uint4*>(call_.x);
    const auto* factor = static_cast<const uint4*>(fusion_.factor);
    if (fusion_.norm_weight != nullptr) {
      if constexpr (kScalesSums<T>) {
        return load_weighted(source, all_read);
      } else {
        return load_normalized(source, all_read);
      }
    }
    wait_for_previous_kernel();
    if (factor == nullptr) {
      each([&](int i) { return load_uncached(source + i); }, [](const uint4& v) { return v; });
    } else {
      each([&](int i) { return Pair{load_uncached(source + i), load_uncached(factor + i)}; },
           [](const Pair& pair) { return product<T>(pair.value, pair.factor); });
    }
    all_read();
  }

  // A thread's own pieces.
  template <class Visit>
  __device__ void visit(const Visit& visit) const {
    for (int i = threadIdx.x; i < padded_; i += kThreads) visit(at(i));
  }

 private:
  static constexpr int kThreads = kWarps * kWarpLanes;
  static constexpr int kAhead = 4;  // pieces of a thread that are loaded at once
  struct Pair {
    uint4 value;
    uint4 factor;
  };

  __device__ uint4& at(int piece) const { return *reinterpret_cast<uint4*>(x_ + x_piece(piece) * 16); }

  // Pieces in turn, of which the first is next: loops over them stay short. Their instructions come from far, once a
  // call.
  template <class Piece>
  struct Held {
    Piece pieces[kAhead];

    __device__ Piece next() {
      const Piece first = pieces[0];
#pragma unroll
      for (int j = 0; j + 1 < kAhead; ++j) pieces[j] = pieces[j + 1];
      return first;
    }
  };

  template <class Read>
  __device__ auto read_ahead(int first, const Read& read) const {
    Held<decltype(read(0))> held{};
#pragma unroll
    for (int j = 0; j < kAhead; ++j)
      if (first + j * kThreads < pieces_) held.pieces[j] = read(first + j * kThreads);
    return held;
  }

  // at(i) = make(read(i)), kAhead reads before what is made of them.
  template <class Read, class Make>
  __device__ void each(const Read& read, const Make& make) const {
    for (int first = threadIdx.x; first < padded_; first += kAhead * kThreads) {
      auto held = read_ahead(first, read);
#pragma unroll 1
      for (int i = first; i < min(padded_, first + kAhead * kThreads); i += kThreads) {
        const uint4 made = make(held.next());
        at(i) = i < pieces_ ? made : make_uint4(0, 0, 0, 0);
      }
    }
  }

  // On its way while the previous kernel ends, which may have made it.
  __device__ const uint4* prefetched_weight() const {
    const auto* weight = static_cast<const uint4*>(fusion_.norm_weight);
    for (int i = threadIdx.x; i < pieces_; i += kThreads) prefetch_l2(weight + i);
    return weight;
  }

  __device__ void store_squares(float sum) const {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffff, sum, distance);
    if (threadIdx.x % kWarpLanes == 0) squares_[threadIdx.x / kWarpLanes] = sum;
  }

  // No thread waits for the others' squares.
  template <class AllRead>
  __device__ void load_weighted(const uint4* source, const AllRead& all_read) {
    const uint4* weight = prefetched_weight();
    wait_for_previous_kernel();
    float squares = 0;
    each([&](int i) { return Pair{load_uncached(source + i), load_uncached(weight + i)}; },
         [&](const Pair& pair) {
           squares += sum_of_squares<T>(pair.value);
           return product<T>(pair.value, pair.factor);
         });
    all_read();
    store_squares(squares);
  }

  template <class AllRead>
  __device__ void load_normalized(const uint4* source, const AllRead& all_read) {
    const uint4* weight = prefetched_weight();
    const auto read_weight = [&](int i) { return load_uncached(weight + i); };
    wait_for_previous_kernel();
    auto weights = read_ahead(threadIdx.x, read_weight);
    float squares = 0;
    each([&](int i) { return load_uncached(source + i); },
         [&](const uint4& v) { return squares += sum_of_squares<T>(v), v; });
    all_read();
    store_squares(squares);
    synchronize(kInputBarrier, kThreads);
    const float scale = norm_scale<kWarps>(squares_, call_, fusion_);
    for (int first = threadIdx.x; first < pieces_; first += kAhead * kThreads) {
      if (first != threadIdx.x) weights = read_ahead(first, read_weight);
#pragma unroll 1
      for (int i = first; i < min(pieces_, first + kAhead * kThreads); i += kThreads)
        at(i) = normalized<T>(at(i), weights.next(), scale);
    }
  }

  unsigned char* const x_;
  float* const squares_;
  const LinearCall& call_;
  const Fusion& fusion_;
  const int pieces_;
  const int padded_;
};

#endif

}  // namespace squeezellm_hf::cuda::streamed
