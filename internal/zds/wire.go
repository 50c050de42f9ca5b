// Package zds is the real protocol between istio-cni, which listens, and
// ztunnel, which dials: protobuf messages on a SOCK_SEQPACKET Unix socket, one a
// packet. It holds messages and framing, no policy.
//
// ztunnel says hello; from then on the agent asks and ztunnel answers each
// request with one ack, matched by nothing but its order. An add carries the
// pod's network namespace as a descriptor; nothing else carries one.
//
// The functions in this file are pure; Conn does the talking.
package zds

import (
	"errors"
	"fmt"

	"google.golang.org/protobuf/proto"
)

//go:generate protoc --go_out=. --go_opt=paths=source_relative zds.proto

// Network is the kind of socket, in the words of package net.
const Network = "unixpacket"

// MaxPacket is the size of the receive buffer on either side, in bytes. A longer
// packet is cut by the kernel and refused.
const MaxPacket = 1024

// What can be wrong with a packet that decodes. The words are ztunnel's.
var (
	ErrNoPayload = errors.New("no payload")
	//lint:ignore ST1005 ztunnel writes it so
	ErrNoDescriptor = errors.New("No control message")
	//lint:ignore ST1005 ztunnel writes it so
	ErrWithDescriptor = errors.New("Unexpected control message")
	ErrTooLong        = fmt.Errorf("the message is longer than the %d bytes that the peer can read", MaxPacket)
)

// ParseRequest decodes what the agent has sent, with or without a descriptor,
// in ztunnel's order of checks.
func ParseRequest(b []byte, withFD bool) (*WorkloadRequest, error) {
	req := new(WorkloadRequest)
	if err := proto.Unmarshal(b, req); err != nil {
		return nil, fmt.Errorf("decode request % x: %w", b, err)
	}
	_, add := req.Payload.(*WorkloadRequest_Add)
	switch {
	case req.Payload == nil: // unset, or a member that we do not know
		return nil, ErrNoPayload
	case add && !withFD:
		return nil, ErrNoDescriptor
	case !add && withFD:
		return nil, ErrWithDescriptor
	}
	return req, nil
}

// ParseResponse decodes ztunnel's answer and returns the text of a nack, or ""
// for an ack.
func ParseResponse(b []byte) (nack string, err error) {
	resp := new(WorkloadResponse)
	if err := proto.Unmarshal(b, resp); err != nil {
		return "", fmt.Errorf("decode response % x: %w", b, err)
	}
	if resp.Payload == nil {
		return "", ErrNoPayload
	}
	return resp.GetAck().GetError(), nil
}

// ParseHello decodes ztunnel's first packet. Which version it names is for the
// caller to judge.
func ParseHello(b []byte) (Version, error) {
	hello := new(ZdsHello)
	if err := proto.Unmarshal(b, hello); err != nil {
		return 0, fmt.Errorf("decode hello % x: %w", b, err)
	}
	return hello.Version, nil
}

// Add asks ztunnel to serve a pod. Its packet carries the namespace.
func Add(uid, name, namespace, serviceAccount string) *WorkloadRequest {
	return &WorkloadRequest{Payload: &WorkloadRequest_Add{Add: &AddWorkload{
		Uid:          uid,
		WorkloadInfo: &WorkloadInfo{Name: name, Namespace: namespace, ServiceAccount: serviceAccount},
	}}}
}

// Keep says that a pod still exists.
func Keep(uid string) *WorkloadRequest {
	return &WorkloadRequest{Payload: &WorkloadRequest_Keep{Keep: &KeepWorkload{Uid: uid}}}
}

// Del says that a pod is gone.
func Del(uid string) *WorkloadRequest {
	return &WorkloadRequest{Payload: &WorkloadRequest_Del{Del: &DelWorkload{Uid: uid}}}
}

// Snapshot says that all pods have been told.
func Snapshot() *WorkloadRequest {
	return &WorkloadRequest{Payload: &WorkloadRequest_SnapshotSent{SnapshotSent: &SnapshotSent{}}}
}

// Response is ztunnel's answer: an ack when nack is empty. A nack is cut to what
// the agent can read.
func Response(nack string) *WorkloadResponse {
	// Six bytes of tags and lengths at the most.
	if len(nack) > MaxPacket-6 {
		nack = nack[:MaxPacket-6]
	}
	return &WorkloadResponse{Payload: &WorkloadResponse_Ack{Ack: &Ack{Error: toValid(nack)}}}
}

// encode marshals a message and checks that the peer can read it.
func encode(m proto.Message) ([]byte, error) {
	b, err := proto.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("encode %T: %w", m, err)
	}
	if len(b) > MaxPacket {
		return nil, ErrTooLong
	}
	return b, nil
}
