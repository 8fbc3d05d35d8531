-- +goose Up

-- An appraisal wants the rejected values of a subject too: they are not learned.
DROP INDEX reference_values_subject;
CREATE INDEX reference_values_subject ON reference_values (subject) WHERE state <> 'proposed';
