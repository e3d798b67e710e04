// The token that follows a prompt of text, from a bundle in plain ONNX Runtime, with one threshold for all groups.
//
// g++ -std=c++20 next_token.cpp -o next_token -lonnxruntime && ./next_token BUNDLE TAU ID...
#include <algorithm>
#include <array>
#include <cstdio>
#include <string>
#include <vector>

#include "onnxruntime_cxx_api.h"

int main(int argc, char** argv) {
  const std::string folder = argv[1];
  Ort::Env env(ORT_LOGGING_LEVEL_ERROR, "modes");
  Ort::SessionOptions options;
  void* handle = nullptr;  // 1: the operator
  Ort::ThrowOnError(Ort::GetApi().RegisterCustomOpsLibrary(options, (folder + "/libmodes_cpu.so").c_str(), &handle));
  Ort::Session embedding(env, (folder + "/embedding.onnx").c_str(), options);
  Ort::Session decoder(env, (folder + "/decoder.onnx").c_str(), options);  // 2: weights lie beside the graph

  auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  std::vector<int64_t> ids;
  for (int i = 3; i < argc; ++i) ids.push_back(std::stoll(argv[i]));
  const int64_t length = ids.size();
  std::vector<int64_t> mask(length, 1), positions;
  for (int row = 0; row < 3; ++row)
    for (int64_t i = 0; i < length; ++i) positions.push_back(i);
  const float threshold = std::stof(argv[2]);
  std::array<float, 5> tau{threshold, threshold, threshold, 0, 0};  // text, vision, decode, audio, special

  auto tensor = [&](auto& values, std::vector<int64_t> shape) {
    return Ort::Value::CreateTensor(memory, std::data(values), std::size(values), shape.data(), shape.size());
  };
  std::vector<float> nothing;
  const int64_t width = embedding.GetOutputTypeInfo(0).GetTensorTypeAndShapeInfo().GetShape()[2];
  const char* names[] = {"input_ids", "image_features"};
  const char* embeds[] = {"inputs_embeds"};
  std::vector<Ort::Value> in;
  in.push_back(tensor(ids, {1, length}));
  in.push_back(tensor(nothing, {0, width}));
  auto embedded = embedding.Run(Ort::RunOptions{}, names, in.data(), 2, embeds, 1);

  std::vector<std::string> inputs{"inputs_embeds", "attention_mask", "position_ids", "input_ids", "tau"};
  std::vector<Ort::Value> values;
  values.push_back(std::move(embedded[0]));
  values.push_back(tensor(mask, {1, length}));
  values.push_back(tensor(positions, {3, 1, length}));
  values.push_back(tensor(ids, {1, length}));
  values.push_back(tensor(tau, {5}));  // left out: the bundle's own
  Ort::AllocatorWithDefaultOptions allocator;
  for (size_t i = 0; i < decoder.GetInputCount(); ++i) {
    std::string name = decoder.GetInputNameAllocated(i, allocator).get();
    if (name.rfind("past_key_values.", 0)) continue;
    auto shape = decoder.GetInputTypeInfo(i).GetTensorTypeAndShapeInfo().GetShape();
    inputs.push_back(name);
    values.push_back(tensor(nothing, {1, shape[1], 0, shape[3]}));
  }
  std::vector<const char*> pointers;
  for (auto& name : inputs) pointers.push_back(name.c_str());
  const char* outputs[] = {"logits"};
  auto found = decoder.Run(Ort::RunOptions{}, pointers.data(), values.data(), values.size(), outputs, 1);  // 3
  auto shape = found[0].GetTensorTypeAndShapeInfo().GetShape();
  const float* row = found[0].GetTensorData<float>() + (shape[1] - 1) * shape[2];
  std::printf("%td %.4f\n", std::max_element(row, row + shape[2]) - row, *std::max_element(row, row + shape[2]));
}
