package verifier

import (
	"crypto/ecdsa"
	"errors"

	"virt-trust/internal/appraise"
)

// sign is package ear's.
func sign(*ecdsa.PrivateKey, string, string, *appraise.Result, string) (string, error) {
	return "", errors.New("results are not signed yet")
}
