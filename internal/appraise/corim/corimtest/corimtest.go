// Package corimtest makes CoRIMs for tests, out of maps: with the numbers of the
// draft, and without the structures that package corim reads them into.
package corimtest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"

	"github.com/fxamacker/cbor/v2"
	"github.com/veraison/go-cose"
)

// Map is a map of the draft.
type Map = map[int]any

// Encode gives CBOR.
func Encode(v any) []byte {
	m, err := cbor.CoreDetEncOptions().EncMode()
	if err != nil {
		panic(err)
	}
	b, err := m.Marshal(v)
	if err != nil {
		panic(err)
	}
	return b
}

// Tagged is a value with a CBOR tag.
func Tagged(number uint64, content any) cbor.Tag { return cbor.Tag{Number: number, Content: content} }

// CoRIM is one with some fields beside id and tags.
func CoRIM(fields Map, tags ...any) []byte {
	m := Map{0: "a CoRIM", 1: tags}
	for k, v := range fields {
		m[k] = v
	}
	return Encode(Tagged(501, m))
}

// CoMID is a tag with reference triples, and more fields.
func CoMID(id string, version int, fields Map, triples ...any) cbor.Tag {
	m := Map{1: Map{0: id, 1: version}, 4: Map{0: triples}}
	for k, v := range fields {
		m[k] = v
	}
	return Tagged(506, Encode(m))
}

// Reference is a reference triple.
func Reference(environment Map, measurements ...any) any { return []any{environment, measurements} }

// Model is an environment of the profile for virt-trust.
func Model(model string) Map { return Map{0: Map{2: model}} }

// Of measures a PCR or a path: its SHA-256 digest.
func Of(element any, sum []byte) Map { return Map{0: element, 1: Map{2: SHA256(sum)}} }

// SHA256 is a list of one digest.
func SHA256(sum []byte) any { return []any{[]any{1, sum}} }

// Sign gives COSE_Sign1. Header replaces parameters of the protected header; nil
// leaves one out.
func Sign(payload []byte, key crypto.Signer, header Map) []byte {
	alg := cose.AlgorithmEdDSA
	if _, ok := key.(*ecdsa.PrivateKey); ok {
		alg = cose.AlgorithmES256
	}
	s, err := cose.NewSigner(alg, key)
	if err != nil {
		panic(err)
	}
	m := cose.NewSign1Message()
	m.Payload = payload
	m.Headers.Protected = cose.ProtectedHeader{
		cose.HeaderLabelAlgorithm: alg, cose.HeaderLabelContentType: "application/rim+cbor", int64(8): Encode(Map{0: Map{0: "a signer"}}),
	}
	for k, v := range header {
		if m.Headers.Protected[int64(k)] = v; v == nil {
			delete(m.Headers.Protected, int64(k))
		}
	}
	if err := m.Sign(rand.Reader, nil, s); err != nil {
		panic(err)
	}
	b, err := m.MarshalCBOR()
	if err != nil {
		panic(err)
	}
	return b
}
