"""What runtimes are called in rows, tables and claims. Free of their libraries, so that results are read without them."""

OURS = "modes"
MOE, QMOE = "onnxruntime MoE", "onnxruntime QMoE"
GROUPED_MM = "torch grouped_mm"
TRITON = "triton fused"
TRANSFORMERS = "transformers grouped_mm"
