// Checks of what Hopper adds. Included by emulator_check.cpp.

// ---- barriers with phases -------------------------------------------------------------------------------------------

constexpr int kStages = 3, kSteps = 20;

// One warp fills stages, three read them; every reader adds what it saw.
void phases_kernel(int* sums) {
  __shared__ Barrier full[kStages], empty[kStages];
  __shared__ int stage[kStages];
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(&full[i], 1);
      barrier_init(&empty[i], 96);
    }
    barrier_init_done();
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    for (int step = 0; threadIdx.x == 0 && step < kSteps; ++step) {
      barrier_wait(&empty[step % kStages], (step / kStages & 1) ^ 1);  // the first time around, at once
      stage[step % kStages] = step * step;
      barrier_arrive(&full[step % kStages]);
    }
    return;
  }
  int sum = 0;
  for (int step = 0; step < kSteps; ++step) {
    barrier_wait(&full[step % kStages], step / kStages & 1);
    sum += stage[step % kStages];
    barrier_arrive(&empty[step % kStages]);
  }
  sums[threadIdx.x - 32] = sum;
}
void check_phases() {
  std::vector<int> sums(96);
  run(launch(phases_kernel, Launch{2, 128, 0, nullptr}, sums.data()));
  int expected = 0;
  for (int step = 0; step < kSteps; ++step) expected += step * step;
  for (int i = 0; i < 96; ++i) expect(sums[static_cast<size_t>(i)] == expected, "phases", i);
}

// ---- tensor loads ---------------------------------------------------------------------------------------------------

struct Aligned {  // of global memory
  std::vector<uint16_t> storage;
  uint16_t* data;
  explicit Aligned(size_t count) : storage(count + 8), data(storage.data()) {
    while (reinterpret_cast<uintptr_t>(data) % 16) ++data;
  }
};

// A box [2, 16, 64] of a tensor [3, 20, 72] from (1, 10, 32): rows 20.. and columns 72.. are outside.
void tensor_load_kernel(const TensorMap swizzled, const TensorMap flat, uint16_t* out, bool visible, bool dirty) {
  __shared__ Barrier barrier;
  unsigned char* shared = dynamic_shared();
  if (threadIdx.x == 0) {
    barrier_init(&barrier, 1);
    if (visible) barrier_init_done();
  }
  __syncthreads();
  if (dirty) shared[threadIdx.x] = 1;
  __syncthreads();
  if (threadIdx.x == 0) {
    barrier_arrive_expect(&barrier, 4096 + 2048);
    tensor_load(shared, swizzled, &barrier, 32, 10, 1);
    tensor_load(shared + 4096, flat, &barrier, -8, 60);
  }
  barrier_wait(&barrier, 0);
  for (unsigned i = threadIdx.x; i < 6144 / 2; i += blockDim.x) out[i] = reinterpret_cast<const uint16_t*>(shared)[i];
}
void check_tensor_load_with(bool visible, bool dirty) {
  Aligned tensor(3 * 20 * 72);
  for (int i = 0; i < 3 * 20 * 72; ++i) tensor.data[i] = static_cast<uint16_t>(i + 1);
  const uint64_t sizes[] = {72, 20, 3}, strides[] = {144, 20 * 144}, flat_sizes[] = {72, 60};
  const uint32_t box[] = {64, 16, 2}, flat_box[] = {32, 32};
  TensorMap swizzled, flat;
  run(make_tensor_map(&swizzled, tensor.data, MODES_BF16, 3, sizes, strides, box, Swizzle::k128Bytes));
  run(make_tensor_map(&flat, tensor.data, MODES_BF16, 2, flat_sizes, strides, flat_box, Swizzle::kNone));
  std::vector<uint16_t> out(3072);
  run(launch(tensor_load_kernel, Launch{1, 64, 6144, nullptr}, swizzled, flat, out.data(), visible, dirty));
  for (int plane = 0; plane < 2; ++plane) {
    for (int row = 0; row < 16; ++row) {
      for (int column = 0; column < 64; ++column) {
        const int r = plane * 16 + row, c0 = column + 32, c1 = row + 10, c2 = plane + 1;
        const int expected = c0 < 72 && c1 < 20 ? (c2 * 20 + c1) * 72 + c0 + 1 : 0;
        // CUDA's table of the 128-byte swizzle: 16-byte part p of row r is at part p ^ (r % 8).
        const int at = r * 64 + ((column / 8) ^ (r % 8)) * 8 + column % 8;
        expect(out[static_cast<size_t>(at)] == expected, "swizzled box", r, column);
      }
    }
  }
  for (int i = 0; i < 32 * 32; ++i) expect(out[static_cast<size_t>(2048 + i)] == 0, "box outside", i);  // rows 60..91
}
void check_tensor_load() {
  check_tensor_load_with(true, false);
  TensorMap map;
  Aligned tensor(4096);
  const uint64_t sizes[] = {64, 32}, strides[] = {128}, odd[] = {136};
  const uint32_t box[] = {64, 32}, half[] = {32, 32}, high[] = {64, 257};
  const auto taken = [&](const uint16_t* base, const uint64_t* steps, const uint32_t* part, Swizzle swizzle) {
    return make_tensor_map(&map, base, MODES_BF16, 2, sizes, steps, part, swizzle) == kSuccess;
  };
  expect(taken(tensor.data, strides, box, Swizzle::k128Bytes), "map");
  expect(!taken(tensor.data + 4, strides, box, Swizzle::kNone), "base");
  expect(!taken(tensor.data, odd, box, Swizzle::kNone), "stride");
  expect(!taken(tensor.data, strides, half, Swizzle::k128Bytes), "row");
  expect(!taken(tensor.data, strides, high, Swizzle::kNone), "box");
}

// ---- products -------------------------------------------------------------------------------------------------------

// d[row, column] of a warpgroup, as "Register fragments for wgmma D" has it: row = 16 * warp + lane / 4 (+ 8),
// column = 8 * i + 2 * (lane % 4) (+ 1).
template <int N>
void store_product(const float (&d)[N / 2], float* out) {
  const int thread = static_cast<int>(threadIdx.x) % 128, warp = thread / 32, lane = thread % 32;
  for (int i = 0; i < N / 8; ++i) {
    for (int j = 0; j < 4; ++j) {
      const int row = 16 * warp + lane / 4 + (j >= 2 ? 8 : 0), column = 8 * i + lane % 4 * 2 + j % 2;
      out[row * N + column] = d[4 * i + j];
    }
  }
}

template <class T>
void fill(Aligned& to, int rows, int offset) {
  for (int i = 0; i < rows; ++i) {
    for (int k = 0; k < 64; ++k) to.data[i * 64 + k] = from_float<T>(static_cast<float>(number(i + offset, k))).bits;
  }
}

void compare_product(const std::vector<float>& out, int columns, int times, const char* what) {
  for (int i = 0; i < 64; ++i) {
    for (int j = 0; j < columns; ++j) {
      int sum = 0;
      for (int k = 0; k < 64; ++k) sum += number(i, k) * number(j + 300, k);
      expect(out[static_cast<size_t>(i * columns + j)] == static_cast<float>(sum * times), what, i, j);
    }
  }
}

// Two warpgroups each make the same product of tiles [64, 64] and [N, 64], twice over.
template <class T, int N>
void product_kernel(const TensorMap rows, const TensorMap columns, float* out) {
  __shared__ Barrier full;
  unsigned char* shared = dynamic_shared();
  unsigned char* const b = shared + 8192;
  if (threadIdx.x == 0) {
    barrier_init(&full, 1);
    barrier_init_done();
    barrier_arrive_expect(&full, 8192 + N * 128);
    tensor_load(shared, rows, &full, 0, 0);
    tensor_load(b, columns, &full, 0, 0);
  }
  __syncthreads();
  barrier_wait(&full, 0);
  float d[N / 2];
  for (int i = 0; i < N / 2; ++i) d[i] = 5;  // to be ignored
  for (int turn = 0; turn < 2; ++turn) {
    product_begin();
    for (int k = 0; k < 4; ++k) {
      product<T, N>(d, tile_descriptor(shared) + 2 * k, tile_descriptor(b) + 2 * k, turn > 0 || k > 0);
    }
    product_commit();
    product_wait<1>();
  }
  product_wait<0>();
  store_product<N>(d, out + threadIdx.x / 128 * 64 * N);
}
template <class T, int N>
void check_product(int32_t dtype) {
  Aligned a(64 * 64), b(N * 64);
  fill<T>(a, 64, 0);
  fill<T>(b, N, 300);
  const uint64_t rows_a[] = {64, 64}, rows_b[] = {64, N}, strides[] = {128};
  const uint32_t box_a[] = {64, 64}, box_b[] = {64, N};
  TensorMap map_a, map_b;
  run(make_tensor_map(&map_a, a.data, dtype, 2, rows_a, strides, box_a, Swizzle::k128Bytes));
  run(make_tensor_map(&map_b, b.data, dtype, 2, rows_b, strides, box_b, Swizzle::k128Bytes));
  std::vector<float> out(2 * 64 * N);
  run(launch(product_kernel<T, N>, Launch{1, 256, 8192 + N * 128, nullptr}, map_a, map_b, out.data()));
  compare_product({out.begin(), out.begin() + 64 * N}, N, 2, "wgmma");
  compare_product({out.begin() + 64 * N, out.end()}, N, 2, "wgmma of the second warpgroup");
}
void check_products() {
  check_product<bf16, 128>(MODES_BF16);
  check_product<f16, 256>(MODES_F16);
}

// The same with tiles that threads bring: a by copy_async, b by plain stores, both swizzled by hand. `slip` says what
// is wrong.
enum Slip { kRight, kUnfenced, kOneFences, kFencedBeforeWait, kNoBegin, kTouched, kMisplaced, kReadEarly };

void gathered_kernel(const uint16_t* a, const uint16_t* b, float* out, int slip) {
  __shared__ Barrier unused;  // a kernel of this kind has some
  if (threadIdx.x == 0) {
    barrier_init(&unused, 1);
    barrier_init_done();
  }
  __syncthreads();
  unsigned char* const tile_a = dynamic_shared() + (slip == kMisplaced ? 512 : 0);
  unsigned char* const tile_b = dynamic_shared() + 9216;
  for (int i = static_cast<int>(threadIdx.x); i < 64 * 8; i += 128) {
    copy_async(tile_a + i / 8 * 128 + ((i % 8) ^ (i / 8 % 8)) * 16, a + i * 8, 16);
  }
  copy_commit();
  for (int i = static_cast<int>(threadIdx.x); i < 128 * 8; i += 128) {
    unsigned char* const to = tile_b + i / 8 * 128 + ((i % 8) ^ (i / 8 % 8)) * 16;
    *reinterpret_cast<uint4*>(to) = reinterpret_cast<const uint4*>(b)[i];
  }
  if (slip == kFencedBeforeWait) fence_async_proxy();
  copy_wait<0>();
  if (slip == kOneFences) {
    __syncthreads();
    if (threadIdx.x == 0) fence_async_proxy();
  } else if (slip != kUnfenced && slip != kFencedBeforeWait) {
    fence_async_proxy();
  }
  __syncthreads();
  float d[64];
  for (float& v : d) v = 1;
  if (slip != kNoBegin) product_begin();
  for (int k = 0; k < 4; ++k) {
    product<bf16, 128>(d, tile_descriptor(tile_a) + 2 * k, tile_descriptor(tile_b) + 2 * k, k > 0);
  }
  product_commit();
  if (slip == kTouched) d[threadIdx.x % 64] = 0;
  if (slip == kReadEarly) store_product<128>(d, out);
  product_wait<0>();
  if (slip != kReadEarly) store_product<128>(d, out);
}
void check_gathered(Slip slip) {
  Aligned a(64 * 64), b(128 * 64);
  fill<bf16>(a, 64, 0);
  fill<bf16>(b, 128, 300);
  std::vector<float> out(64 * 128);
  run(launch(gathered_kernel, Launch{1, 128, 9216 + 16384, nullptr}, static_cast<const uint16_t*>(a.data),
             static_cast<const uint16_t*>(b.data), out.data(), static_cast<int>(slip)));
  if (slip == kReadEarly) {
    for (float v : out) expect(std::isnan(v), "an accumulator under way is not NaN");
  } else {
    compare_product(out, 128, 1, "wgmma of gathered rows");
  }
}
