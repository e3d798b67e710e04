// An answer about an image from a bundle in onnxruntime-genai.
//
// g++ -std=c++20 answer.cpp -o answer -lonnxruntime-genai && ./answer BUNDLE IMAGE QUESTION [GRAPH]
#include <cstdio>
#include <string>
#include <vector>

#include "ort_genai.h"

int main(int argc, char** argv) {
  auto config = OgaConfig::Create(argv[1]);
  if (argc > 4)  // another point of the frontier: one of the folder's decoder-*.onnx
    config->Overlay((std::string(R"({"model": {"decoder": {"filename": ")") + argv[4] + "\"}}}").c_str());
  auto model = OgaModel::Create(*config);
  auto processor = OgaMultiModalProcessor::Create(*model);
  auto tokenizer = OgaTokenizer::Create(*model);
  auto stream = OgaTokenizerStream::Create(*tokenizer);

  std::string chat = R"([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ")";
  chat += std::string(argv[3]) + "\"}]}]";
  OgaString prompt = tokenizer->ApplyChatTemplate(nullptr, chat.c_str(), nullptr, true);
  auto images = OgaImages::Load({argv[2]});
  auto inputs = processor->ProcessImages(prompt, images.get());

  auto parameters = OgaGeneratorParams::Create(*model);
  auto generator = OgaGenerator::Create(*model, *parameters);
  generator->SetInputs(*inputs);
  while (!generator->IsDone()) {
    generator->GenerateNextToken();
    std::printf("%s", stream->Decode(generator->GetNextTokens()[0]));
  }
  std::printf("\n");
}
