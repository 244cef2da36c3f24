from common.grpc_environment import prepare_grpc

prepare_grpc()
